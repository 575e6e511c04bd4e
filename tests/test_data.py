"""Images: the digits, CIFAR-10 in each of its versions and with each fault, the download against a loopback server.

Most of CIFAR-10's tests run on made-up files of 1,000 images. Those at the end need the real sheets in the folder that
MINIDISTILL_CIFAR10 names and are skipped without.
"""

import hashlib
import io
import json
import os
import shutil
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from minidistill import data

REAL = os.environ.get("MINIDISTILL_CIFAR10")
N = 1000  # images in a made-up file, in place of 10,000
BATCHES = {"train": [f"data_batch_{k}.bin" for k in range(1, 6)], "test": ["test_batch.bin"]}


# The digits and what is done to images.


def test_digits_shapes_and_range():
    images, labels = data.digits()
    assert images.shape == (1797, 1, 8, 8)
    assert images.dtype == torch.float32
    assert (images.min(), images.max()) == (-1, 1)
    assert labels.dtype == torch.int64
    assert labels[:10].tolist() == list(range(10))


def test_digits_as_rgb_are_the_digits_enlarged():
    small, labels = data.digits()
    images, same_labels = data.digits_as_rgb()
    assert images.shape == (1797, 3, 32, 32)
    assert images.dtype == torch.uint8
    assert (images.min(), images.max()) == (0, 255)
    assert torch.equal(labels, same_labels)
    assert torch.equal(images, images[:, :1].expand_as(images))
    # Unenlarged they are the digits to the nearest byte; enlarged fourfold, 4x4 blocks average to about their pixels.
    assert torch.equal(data.digits_as_rgb(8)[0][:, :1], ((small + 1) * 127.5).round().to(torch.uint8))
    blocks = torch.nn.functional.avg_pool2d(data.to_float(images[:, :1]), 4)
    assert torch.corrcoef(torch.stack([blocks.flatten(), small.flatten()]))[0, 1] > 0.97
    with pytest.raises(ValueError, match="size=0"):
        data.digits_as_rgb(0)


def test_to_float():
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    kept = levels.clone()
    floats = data.to_float(levels)
    assert floats.dtype == torch.float32
    assert (floats.min(), floats.max()) == (-1, 1)
    assert (floats.flatten().double() - torch.linspace(-1, 1, 256, dtype=torch.float64)).abs().max() < 1e-7
    assert torch.equal(levels, kept)
    assert data.to_float(floats) is floats
    doubles = floats.double()
    assert data.to_float(doubles) is doubles
    with pytest.raises(TypeError, match="int64"):
        data.to_float(levels.long())


def test_random_flip_mirrors_half():
    n = 4000
    images = torch.randint(0, 256, (n, 3, 4, 5), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    kept = images.clone()
    once = data.random_flip(images, torch.Generator().manual_seed(1))
    same = (once == images).flatten(1).all(1)
    mirrored = (once == images.flip(3)).flatten(1).all(1)
    assert torch.equal(images, kept)
    assert once.dtype == torch.uint8
    assert (same ^ mirrored).all()  # whole images, never parts
    assert abs(int(mirrored.sum()) - n / 2) < 5 * (n / 4) ** 0.5  # five standard deviations of the binomial
    assert torch.equal(data.random_flip(once, torch.Generator().manual_seed(1)), images)  # the same coins undo it
    assert not torch.equal(data.random_flip(images, torch.Generator().manual_seed(2)), once)
    rng = torch.Generator().manual_seed(1)
    assert not torch.equal(data.random_flip(images, rng), data.random_flip(images, rng))


# Made-up files.


def write_sheet(path, images):
    """Images (n, 3, 32, 32) pasted one by one, 100 a row. Returns what a manifest says of them."""
    sheet = Image.new("RGB", (3200, len(images) // 100 * 32))
    for i, image in enumerate(images.transpose(0, 2, 3, 1)):
        sheet.paste(Image.fromarray(image), (i % 100 * 32, i // 100 * 32))
    sheet.save(path, lossless=True, exact=True, method=0, quality=0)
    return {"n": len(images), "pixels_sha256": hashlib.sha256(images.transpose(0, 2, 3, 1).tobytes()).hexdigest()}


def as_records(images, labels):
    return b"".join(bytes([label]) + image.tobytes() for image, label in zip(images, labels, strict=True))


def set_hash(images, labels):
    digests = [hashlib.sha256(as_records([i], [y])).digest() for i, y in zip(images, labels, strict=True)]
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Six made-up files of 1,000 images in both versions, the same images in the same order."""
    rng = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("cifar10")
    sheets, binary = root / "sheets", root / "binary"
    sheets.mkdir()
    binary.mkdir()
    labels = np.repeat(np.arange(10), N // 10)
    images, manifest = {"train": [], "test": []}, {}
    for split in images:
        for k, batch in enumerate(BATCHES[split]):
            part = rng.integers(0, 256, (N, 3, 4, 4), dtype=np.uint8).repeat(8, 2).repeat(8, 3)
            name = f"train-{k}.webp" if split == "train" else "test.webp"
            manifest[name] = write_sheet(sheets / name, part)
            (binary / batch).write_bytes(as_records(part, labels))
            images[split].append(part)
    for name, split, each in (("ci-train-5000.webp", "train", 50), ("ci-test-1000.webp", "test", 10)):
        first = images[split][0].reshape(10, N // 10, 3, 32, 32)[:, :each].reshape(-1, 3, 32, 32)
        manifest[name] = write_sheet(sheets / name, first)
    (sheets / "manifest.json").write_text(json.dumps({"files": manifest}))
    whole = {split: np.concatenate(parts) for split, parts in images.items()}
    return SimpleNamespace(
        sheets=sheets, binary=binary,
        images={split: torch.tensor(x) for split, x in whole.items()},
        labels={"train": torch.tensor(np.tile(labels, 5)), "test": torch.tensor(labels)},
        sha256={split: set_hash(x, np.tile(labels, len(x) // N)) for split, x in whole.items()},
    )


@pytest.fixture
def small(made, monkeypatch, tmp_path):
    """The made-up files, the module believing that CIFAR-10 is this small."""
    monkeypatch.delenv("MINIDISTILL_CIFAR10", raising=False)
    monkeypatch.setattr(data, "RECORDS", N)
    few = {"train": ("ci-train-5000.webp", N // 2), "test": ("ci-test-1000.webp", N // 10)}
    monkeypatch.setattr(data, "SMALL_SHEETS", few)
    monkeypatch.setattr(data, "SPLIT_SHA256", made.sha256)
    monkeypatch.setattr(data, "CACHE", str(tmp_path / "cache"))
    return made


def copy(source, target, *names):
    target.mkdir(parents=True, exist_ok=True)
    for name in names or [p.name for p in source.iterdir()]:
        shutil.copyfile(source / name, target / name)
    return target


def tar_gz(path, members, monkeypatch):
    """An archive of {name: bytes, or a TarInfo for anything special}; its md5 becomes the official one."""
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        for name, content in members.items():
            member = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            if isinstance(content, bytes):
                member.size = len(content)
            tar.addfile(member, io.BytesIO(content) if isinstance(content, bytes) else None)
    monkeypatch.setattr(data, "ARCHIVE_MD5", hashlib.md5(path.read_bytes()).hexdigest())
    return path


def official(made, split="test"):
    return {f"cifar-10-batches-bin/{name}": (made.binary / name).read_bytes() for name in BATCHES[split]}


def is_whole(made, split, found):
    images, labels = found
    assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
    assert images.is_contiguous()
    return torch.equal(images, made.images[split]) and torch.equal(labels, made.labels[split])


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_version_gives_the_same(small, split, tmp_path, monkeypatch):
    assert is_whole(small, split, data.cifar10(small.sheets, split))
    assert is_whole(small, split, data.cifar10(str(small.binary), split))
    subfolder = tmp_path / "sub"
    copy(small.binary, subfolder / "cifar-10-batches-bin")
    assert is_whole(small, split, data.cifar10(subfolder, split))
    archive = tar_gz(tmp_path / "cifar-10-binary.tar.gz", official(small, split), monkeypatch)
    assert is_whole(small, split, data.cifar10(archive, split))
    assert is_whole(small, split, data.cifar10(tmp_path, split))
    monkeypatch.setenv("MINIDISTILL_CIFAR10", str(archive))
    assert is_whole(small, split, data.cifar10(split=split))


def test_train_is_the_default_and_root_wins_over_the_variable(small, monkeypatch, tmp_path):
    monkeypatch.setenv("MINIDISTILL_CIFAR10", str(tmp_path))
    assert is_whole(small, "train", data.cifar10(small.binary))


@pytest.mark.parametrize(("split", "n"), [
    ("train", 10), ("train", 500), ("train", 510), ("train", 1000), ("train", 3300), ("train", 5000),
    ("test", 100), ("test", 110), ("test", 1000),
])
def test_subsets_are_balanced_and_equal_across_versions(small, split, n, tmp_path):
    images, labels = data.cifar10(small.sheets, split, n=n)
    assert images.is_contiguous()
    assert labels.bincount().tolist() == [n // 10] * 10
    for label in range(10):  # the first n / 10 of each class in file order
        truth = small.images[split][small.labels[split] == label][: n // 10]
        assert torch.equal(images[labels == label], truth)
    full = copy(small.sheets, tmp_path, *(p.name for p in small.sheets.iterdir() if not p.name.startswith("ci-")))
    for root in (small.binary, full):
        again, labels_again = data.cifar10(root, split, n=n)
        assert torch.equal(images, again)
        assert torch.equal(labels, labels_again)


def test_subset_of_records_in_any_order(small, tmp_path, monkeypatch):
    order = np.random.default_rng(1).permutation(N)
    images, labels = small.images["test"][order], small.labels["test"][order]
    (tmp_path / "test_batch.bin").write_bytes(as_records(images.numpy(), labels.tolist()))
    found, found_labels = data.cifar10(tmp_path, "test", n=30)  # the hash knows no order
    where = sorted(i for label in range(10) for i in (labels == label).nonzero()[:3, 0].tolist())
    assert torch.equal(found, images[where])
    assert torch.equal(found_labels, labels[where])


def test_subset_of_unbalanced_records(small, tmp_path):
    records = as_records(small.images["test"].numpy(), [min(label, 8) for label in small.labels["test"].tolist()])
    (tmp_path / "test_batch.bin").write_bytes(records)
    with pytest.raises(ValueError, match="0 images of class truck"):
        data.cifar10(tmp_path, "test", n=10, verify=False)


def test_only_the_sheets_that_are_needed(small, tmp_path):
    few = copy(small.sheets, tmp_path / "few", "train-0.webp", "train-1.webp", "manifest.json")
    assert len(data.cifar10(few, n=2000)[0]) == 2000
    with pytest.raises(FileNotFoundError, match=r"train-2\.webp: no such file; there are manifest\.json, train-0"):
        data.cifar10(few, n=2010)
    ci = copy(small.sheets, tmp_path / "ci", "ci-train-5000.webp", "ci-test-1000.webp", "manifest.json")
    assert len(data.cifar10(ci, n=500)[0]) == 500
    assert len(data.cifar10(ci, "test", n=100)[0]) == 100
    for n in (510, None):
        with pytest.raises(FileNotFoundError, match=r"train-0\.webp: no such file; there are .*ci-train-5000\.webp"):
            data.cifar10(ci, n=n)


# Arguments and missing files.


def test_bad_arguments(small, tmp_path):
    with pytest.raises(ValueError, match="split='tests' is not known; did you mean 'test'"):
        data.cifar10(small.binary, "tests")
    for n in (0, 15, -10, 1010, True, 10.0, "10"):
        with pytest.raises(ValueError, match=r"n=.*multiple of 10.* 1000"):
            data.cifar10(small.binary, "test", n=n)
    with pytest.raises(ValueError, match=r"root=.*MINIDISTILL_CIFAR10.*download=True"):
        data.cifar10()
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist.*download=True"):
        data.cifar10(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds nothing of the test split.*test_batch\.bin.*tar\.gz"):
        data.cifar10(tmp_path, "test")


def test_missing_batch(small, tmp_path):
    copy(small.binary, tmp_path, "data_batch_1.bin", "data_batch_3.bin")
    with pytest.raises(FileNotFoundError, match=r"data_batch_2\.bin: no such file; there are data_batch_1\.bin"):
        data.cifar10(tmp_path)


# Faulty binary files.


@pytest.mark.parametrize(("change", "what"), [
    (lambda b: b[:-1], "is truncated: it has 3072999 bytes; wanted 3073000"),
    (lambda b: b"", "is truncated: it has 0 bytes"),
    (lambda b: b + b"\0", "is too long: it has 3073001 bytes; wanted 3073000"),
    (lambda b: b[: 3073 * 7] + b"\x0a" + b[3073 * 7 + 1:], "record 7 has label 10; wanted 0 to 9"),
], ids=["truncated", "empty", "too-long", "label"])
def test_faulty_batch(small, tmp_path, monkeypatch, change, what):
    faulty = change((small.binary / "test_batch.bin").read_bytes())
    (tmp_path / "test_batch.bin").write_bytes(faulty)
    with pytest.raises(ValueError, match=rf"test_batch\.bin:? {what}"):
        data.cifar10(tmp_path, "test", n=10, verify=False)
    archive = tar_gz(tmp_path / "cifar-10-binary.tar.gz", {"cifar-10-batches-bin/test_batch.bin": faulty}, monkeypatch)
    with pytest.raises(ValueError, match=rf"tar\.gz:cifar-10-batches-bin/test_batch\.bin:? {what}"):
        data.cifar10(archive, "test", verify=False)


@pytest.mark.parametrize("place", [0, 5, 3073 * N - 1], ids=["label", "pixel", "last pixel"])
def test_one_changed_byte_is_noticed(small, tmp_path, place):
    changed = bytearray((small.binary / "test_batch.bin").read_bytes())
    changed[place] ^= 1
    (tmp_path / "test_batch.bin").write_bytes(changed)
    for n in (None, 10):
        with pytest.raises(ValueError, match=r"its test split is not CIFAR-10's.*verify=False"):
            data.cifar10(tmp_path, "test", n=n)
    images, _ = data.cifar10(tmp_path, "test", verify=False)
    assert int((images != small.images["test"]).sum()) == (place > 0)


# Archives.


def test_wrong_archives(small, tmp_path, monkeypatch):
    path = tmp_path / "cifar-10-binary.tar.gz"
    tar_gz(path, official(small), monkeypatch)
    good = path.read_bytes()
    path.write_bytes(good[:-1])
    with pytest.raises(ValueError, match=r"tar\.gz has md5 [0-9a-f]{32}; wanted [0-9a-f]{32}"):
        data.cifar10(path, "test", verify=False)
    path.write_bytes(b"<html>moved</html>")
    with pytest.raises(ValueError, match=r"tar\.gz is not a gzip file"):
        data.cifar10(path, "test")
    for bad in (good[: len(good) // 2], good[:200] + bytes(400) + good[600:]):  # cut short; the stream broken
        path.write_bytes(bad)
        monkeypatch.setattr(data, "ARCHIVE_MD5", hashlib.md5(bad).hexdigest())
        with pytest.raises(ValueError, match=r"tar\.gz can't be read as a tar\.gz"):
            data.cifar10(path, "test")


def test_the_official_md5():
    assert data.ARCHIVE_MD5 == "c32a1d4ab5d03f1284b67883e8d87530"


def test_unsafe_members_do_nothing(small, tmp_path, monkeypatch):
    """Names that point outside are ignored, links in place of files refused, and nothing is ever written."""
    good = official(small)
    name = "cifar-10-batches-bin/test_batch.bin"
    secret = tmp_path / "secret"
    secret.write_bytes(good[name])
    folder = tmp_path / "inner"
    folder.mkdir()
    path = folder / "cifar-10-binary.tar.gz"
    unsafe = {"../escaped.bin": b"x", str(tmp_path / "absolute.bin"): b"x", f"../{name}": b"x", f"x/../{name}": b"x",
              "test_batch.bin": b"x"}
    before = sorted(tmp_path.rglob("*"))
    tar_gz(path, {**unsafe, **good}, monkeypatch)
    assert is_whole(small, "test", data.cifar10(path, "test"))
    tar_gz(path, unsafe, monkeypatch)
    with pytest.raises(FileNotFoundError, match=rf"holds no regular file {name}"):
        data.cifar10(path, "test")
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
        link = tarfile.TarInfo(name)
        link.type, link.linkname = kind, str(secret) if kind == tarfile.SYMTYPE else "x"
        tar_gz(path, {"x": good[name], name: link}, monkeypatch)
        with pytest.raises(FileNotFoundError, match=rf"holds no regular file {name}"):
            data.cifar10(path, "test")
    assert sorted(tmp_path.rglob("*")) == sorted([*before, path])


# Faulty sheets.


def test_faulty_manifest(small, tmp_path):
    copy(small.sheets, tmp_path, "test.webp")
    with pytest.raises(FileNotFoundError, match=r"manifest\.json: no such file"):
        data.cifar10(tmp_path, "test")
    manifest = tmp_path / "manifest.json"
    for text in ("{", "[]", "{}", '{"files": {"test.webp": {}}}', '{"files": ["test.webp"]}'):
        manifest.write_text(text)
        with pytest.raises(ValueError, match=r"manifest\.json lacks files -> name -> pixels_sha256"):
            data.cifar10(tmp_path, "test")
    manifest.write_text('{"files": {"train-0.webp": {"pixels_sha256": ""}}}')
    with pytest.raises(ValueError, match=r"manifest\.json is without test\.webp; it knows train-0\.webp"):
        data.cifar10(tmp_path, "test")


def test_faulty_sheets(small, tmp_path):
    path = copy(small.sheets, tmp_path, "test.webp", "manifest.json") / "test.webp"
    good = path.read_bytes()
    shutil.copyfile(small.sheets / "ci-train-5000.webp", path)
    with pytest.raises(ValueError, match=r"test\.webp is 3200 x 160 pixels; wanted 3200 x 320"):
        data.cifar10(tmp_path, "test")
    png = io.BytesIO()
    Image.new("RGB", (3200, 320)).save(png, "PNG")
    for bad in (b"", b"RIFF", good[: len(good) // 2], png.getvalue()):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=r"test\.webp can't be decoded as WebP"):
            data.cifar10(tmp_path, "test")
    shutil.copyfile(small.sheets / "train-0.webp", path)  # sound, but not the manifest's
    with pytest.raises(ValueError, match=r"test\.webp is corrupt: its pixels have SHA-256"):
        data.cifar10(tmp_path, "test", n=10, verify=False)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["files"]["test.webp"] = manifest["files"]["train-0.webp"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="its test split is not CIFAR-10's"):  # the manifest changed with it
        data.cifar10(tmp_path, "test")
    assert torch.equal(data.cifar10(tmp_path, "test", verify=False)[0], small.images["train"][:N])


# The download.


class Handler(BaseHTTPRequestHandler):
    """Answers with the server's `payload`; its `script` says with which error, or after how many bytes to stop."""

    def do_GET(self):
        server, asked = self.server, self.headers.get("Range")
        step = server.script.pop(0) if server.script else None
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and server.ranges else 0
        status = step if step in (404, 503) else 416 if start >= len(server.payload) else 206 if start else 200
        body = server.payload[start:] if status < 400 else b""
        sent = body[:step] if step and status < 400 else body
        server.log.append((asked, status, len(sent)))  # before the client can see that it has everything
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{len(server.payload) - 1}/{len(server.payload)}")
        self.end_headers()
        self.wfile.write(sent)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(small, tmp_path, monkeypatch):
    """The archive of the made-up test split behind a loopback server that keeps a log of its requests."""
    path = tar_gz(tmp_path / "source.tar.gz", official(small), monkeypatch)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.payload, server.script, server.ranges, server.log = path.read_bytes(), [], True, []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(data, "URL", f"http://127.0.0.1:{server.server_port}/cifar-10-binary.tar.gz")
    monkeypatch.setattr(data, "PAUSE", 0.0)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def contents(folder):
    return sorted(p.name for p in folder.iterdir()) if folder.exists() else None


def test_download(server, small, tmp_path):
    root = tmp_path / "deep" / "new"
    assert is_whole(small, "test", data.cifar10(root, "test", download=True))
    assert contents(root) == ["cifar-10-binary.tar.gz"]
    assert server.log == [(None, 200, len(server.payload))]
    assert is_whole(small, "test", data.cifar10(root, "test", download=True))  # it is there now
    assert is_whole(small, "test", data.cifar10(root, "test"))
    assert len(server.log) == 1


def test_download_goes_to_the_cache_or_the_variable_or_a_named_archive(server, small, tmp_path, monkeypatch):
    data.cifar10(split="test", download=True)
    assert contents(tmp_path / "cache") == ["cifar-10-binary.tar.gz"]
    monkeypatch.setenv("MINIDISTILL_CIFAR10", str(tmp_path / "variable"))
    data.cifar10(split="test", download=True)
    assert contents(tmp_path / "variable") == ["cifar-10-binary.tar.gz"]
    data.cifar10(tmp_path / "named" / "mine.tar.gz", "test", download=True)
    assert contents(tmp_path / "named") == ["mine.tar.gz"]
    assert len(server.log) == 3


def test_nothing_is_downloaded_where_data_are(server, small):
    assert is_whole(small, "test", data.cifar10(small.sheets, "test", download=True))
    assert is_whole(small, "test", data.cifar10(small.binary, "test", download=True))
    assert server.log == []


def test_download_resumes_within_the_call(server, small, tmp_path):
    """Two requests are cut off and one is refused; each sends only what is still missing."""
    size = len(server.payload)
    server.script = [1000, 503, 5000]
    assert is_whole(small, "test", data.cifar10(tmp_path / "new", "test", download=True))
    assert server.log == [
        (None, 200, 1000), ("bytes=1000-", 503, 0), ("bytes=1000-", 206, 5000), ("bytes=6000-", 206, size - 6000)
    ]
    assert contents(tmp_path / "new") == ["cifar-10-binary.tar.gz"]


def test_download_resumes_in_the_next_call(server, small, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "ATTEMPTS", 1)
    server.script = [70_000]
    root = tmp_path / "new"
    with pytest.raises(OSError, match=rf"{data.URL} could not be fetched.* after 70000 of {len(server.payload)} bytes"):
        data.cifar10(root, "test", download=True)
    assert contents(root) == ["cifar-10-binary.tar.gz.partial"]
    assert (root / "cifar-10-binary.tar.gz.partial").read_bytes() == server.payload[:70_000]
    assert is_whole(small, "test", data.cifar10(root, "test", download=True))
    assert server.log[1] == ("bytes=70000-", 206, len(server.payload) - 70_000)
    assert contents(root) == ["cifar-10-binary.tar.gz"]


def test_download_from_a_server_without_ranges(server, small, tmp_path):
    server.ranges, server.script = False, [1000]
    assert is_whole(small, "test", data.cifar10(tmp_path / "new", "test", download=True))
    assert server.log == [(None, 200, 1000), ("bytes=1000-", 200, len(server.payload))]


def test_download_that_was_complete_but_not_yet_renamed(server, small, tmp_path):
    (tmp_path / "cifar-10-binary.tar.gz.partial").write_bytes(server.payload)
    assert is_whole(small, "test", data.cifar10(tmp_path, "test", download=True))
    assert [status for _, status, _ in server.log] == [416]


def test_download_with_the_wrong_checksum_leaves_nothing(server, small, tmp_path):
    root = tmp_path / "new"
    root.mkdir()
    (root / "cifar-10-binary.tar.gz.partial").write_bytes(b"of something else")
    with pytest.raises(ValueError, match=rf"{data.URL}: what arrived has md5 .*; wanted {data.ARCHIVE_MD5}"):
        data.cifar10(root, "test", download=True)
    assert contents(root) == []
    assert is_whole(small, "test", data.cifar10(root, "test", download=True))  # from the start
    assert server.log[-1][0] is None


def test_download_that_is_not_there(server, tmp_path):
    server.script = [404]
    with pytest.raises(OSError, match=rf"{data.URL} could not be fetched: HTTP Error 404"):
        data.cifar10(tmp_path / "new", "test", download=True)
    assert contents(tmp_path / "new") is None
    assert len(server.log) == 1  # asking again would not help


def test_download_without_a_network(small, tmp_path, monkeypatch):
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as closed:
        port = closed.server_port
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(data, "URL", f"http://127.0.0.1:{port}/x")
    monkeypatch.setattr(data, "PAUSE", 0.0)
    with pytest.raises(OSError, match=rf"http://127\.0\.0\.1:{port}/x could not be fetched: .*refused"):
        data.cifar10(tmp_path / "new", "test", download=True)
    assert contents(tmp_path / "new") is None


# The real thing.


@pytest.fixture(scope="module")
def real():
    if not REAL:
        pytest.skip("set MINIDISTILL_CIFAR10 to a folder with CIFAR-10's sheets to run this")
    if not (Path(REAL) / "test.webp").is_file():
        pytest.skip(f"MINIDISTILL_CIFAR10={REAL} holds no sheets (test.webp)")
    return Path(REAL)


def test_real_train_split_has_the_published_statistics(real):
    images, labels = data.cifar10(real)
    assert images.shape == (50_000, 3, 32, 32)
    assert labels.bincount().tolist() == [5000] * 10
    counts = torch.stack([images[:, c].flatten().bincount(minlength=256) for c in range(3)]).double()
    levels = torch.arange(256) / 255
    mean = counts @ levels.double() / counts.sum(1)
    std = (counts @ levels.double().square() / counts.sum(1) - mean.square()).sqrt()
    torch.testing.assert_close(mean, torch.tensor([0.4914, 0.4822, 0.4465]).double(), rtol=0, atol=1e-4)
    torch.testing.assert_close(std, torch.tensor([0.2470, 0.2435, 0.2616]).double(), rtol=0, atol=1e-4)


def test_real_round_trip_and_corruption(real, tmp_path):
    images, labels = data.cifar10(real, "test")
    records = bytearray(as_records(images.numpy(), labels.tolist()))
    path = tmp_path / "test_batch.bin"
    path.write_bytes(records)
    again, labels_again = data.cifar10(tmp_path, "test")
    assert torch.equal(images, again)
    assert torch.equal(labels, labels_again)
    records[12_345_678] ^= 0x10
    path.write_bytes(records)
    with pytest.raises(ValueError, match="its test split is not CIFAR-10's"):
        data.cifar10(tmp_path, "test")


def test_real_small_sheets_agree_with_the_full_ones(real, tmp_path):
    if not all((real / name).is_file() for name in ("ci-train-5000.webp", "ci-test-1000.webp")):
        pytest.skip(f"MINIDISTILL_CIFAR10={real} holds no ci-*.webp")
    for name in ("train-0.webp", "test.webp", "manifest.json"):
        (tmp_path / name).symlink_to(real.resolve() / name)
    for split, n in (("train", 5000), ("test", 300)):
        images, labels = data.cifar10(real, split, n=n)
        full, full_labels = data.cifar10(tmp_path, split, n=n)
        assert torch.equal(images, full)
        assert torch.equal(labels, full_labels)
        assert labels.bincount().tolist() == [n // 10] * 10
