"""CIFAR-10 in each of its forms and with each fault, the download against a loopback server.

Most tests run on made-up files of 1,000 images. Those at the end need the real binary files in the folder that
MINIDISTILL_CIFAR10 names and are skipped without.
"""

import hashlib
import io
import os
import shutil
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pooch.core
import pytest
import torch

from minidistill import data
from minidistill.data import cifar

REAL = os.environ.get("MINIDISTILL_CIFAR10")
N = 1000  # images in a made-up file, in place of 10,000
BATCHES = {"train": [f"data_batch_{k}.bin" for k in range(1, 6)], "test": ["test_batch.bin"]}


# Made-up files.


def as_records(images, labels):
    return b"".join(bytes([label]) + image.tobytes() for image, label in zip(images, labels, strict=True))


def set_hash(images, labels):
    digests = [hashlib.sha256(as_records([i], [y])).digest() for i, y in zip(images, labels, strict=True)]
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Six made-up files of 1,000 images."""
    rng = np.random.default_rng(0)
    binary = tmp_path_factory.mktemp("cifar10")
    labels = np.repeat(np.arange(10), N // 10)
    images = {"train": [], "test": []}
    for split in images:
        for batch in BATCHES[split]:
            part = rng.integers(0, 256, (N, 3, 4, 4), dtype=np.uint8).repeat(8, 2).repeat(8, 3)
            (binary / batch).write_bytes(as_records(part, labels))
            images[split].append(part)
    whole = {split: np.concatenate(parts) for split, parts in images.items()}
    return SimpleNamespace(
        binary=binary,
        images={split: torch.tensor(x) for split, x in whole.items()},
        labels={"train": torch.tensor(np.tile(labels, 5)), "test": torch.tensor(labels)},
        sha256={split: set_hash(x, np.tile(labels, len(x) // N)) for split, x in whole.items()},
    )


@pytest.fixture
def small(made, monkeypatch, tmp_path):
    """The made-up files, the module believing that CIFAR-10 is this small."""
    monkeypatch.delenv("MINIDISTILL_CIFAR10", raising=False)
    monkeypatch.setattr(cifar, "RECORDS", N)
    monkeypatch.setattr(cifar, "SPLIT_SHA256", made.sha256)
    monkeypatch.setattr(cifar, "CACHE", tmp_path / "cache")
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
    monkeypatch.setattr(cifar, "ARCHIVE_MD5", hashlib.md5(path.read_bytes()).hexdigest())
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
    ("train", 10), ("train", 510), ("train", 5000), ("test", 110), ("test", 1000),
])
def test_subsets_are_balanced(small, split, n):
    images, labels = data.cifar10(small.binary, split, n=n)
    assert images.is_contiguous()
    assert labels.bincount().tolist() == [n // 10] * 10
    for label in range(10):  # the first n / 10 of each class in file order
        truth = small.images[split][small.labels[split] == label][: n // 10]
        assert torch.equal(images[labels == label], truth)


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


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
def test_smaller_images_are_block_means_rounded_half_up(small, size):
    """Against NumPy, in whole numbers: blocks of b x b bytes sum to s, and the byte is floor(s / b^2 + 1/2)."""
    rng = np.random.default_rng(2)
    full = rng.integers(0, 256, (5500, 3, 32, 32), dtype=np.uint8)  # more than one part
    full[0], full[1, :, ::2], full[1, :, 1::2] = 255, 3, 4  # the last: every mean of two rows or more is a half
    b = 32 // size
    sums = full.reshape(-1, 3, size, b, size, b).sum((3, 5), dtype=np.int64)
    wanted = torch.tensor((2 * sums + b * b) // (2 * b * b)).to(torch.uint8)
    assert wanted[1].unique().tolist() == [4]
    assert torch.equal(data.smaller(torch.tensor(full), size), wanted)
    images, labels = data.cifar10(small.binary, "test", size=size)
    assert (images.dtype, images.shape, labels.shape) == (torch.uint8, (N, 3, size, size), (N,))
    assert torch.equal(images, data.smaller(small.images["test"], size))


@pytest.mark.parametrize("size", [0, -16, 3, 20, 64, 16.0, True, "16"])
def test_sizes_that_do_not_divide(small, size):
    with pytest.raises(ValueError, match=rf"size={size!r}: wanted"):
        data.cifar10(small.binary, "test", size=size)
    with pytest.raises(ValueError, match=r"size=5: wanted a divisor of .* 8 x 8"):
        data.smaller(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), 5)


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
    for bad in (good[:-1], b"<html>moved</html>"):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=r"tar\.gz has md5 [0-9a-f]{32}; wanted [0-9a-f]{32}"):
            data.cifar10(path, "test", verify=False)
    for bad in (good[: len(good) // 2], good[:200] + bytes(400) + good[600:], b"<html>moved</html>"):
        path.write_bytes(bad)
        monkeypatch.setattr(cifar, "ARCHIVE_MD5", hashlib.md5(bad).hexdigest())
        with pytest.raises(ValueError, match=r"tar\.gz can't be read as a tar\.gz"):
            data.cifar10(path, "test")


def test_the_official_md5():
    assert cifar.ARCHIVE_MD5 == "c32a1d4ab5d03f1284b67883e8d87530"


def test_unsafe_members_do_nothing(small, tmp_path, monkeypatch):
    """Names that point outside are ignored, links in place of files refused, and nothing is left of what was unpacked:
    though only an archive of the official md5 gets so far."""
    good = official(small)
    name = "cifar-10-batches-bin/test_batch.bin"
    secret = tmp_path / "secret"
    secret.write_bytes(good[name])
    folder, temporary = tmp_path / "inner", tmp_path / "temporary"
    folder.mkdir()
    temporary.mkdir()
    monkeypatch.setattr(cifar.tempfile, "tempdir", str(temporary))
    path = folder / "cifar-10-binary.tar.gz"
    unsafe = {"../escaped.bin": b"x", str(tmp_path / "absolute.bin"): b"x", f"../{name}": b"x", f"x/../{name}": b"x",
              "test_batch.bin": b"x", f"{name}/../../../escaped.bin": b"x"}
    before = sorted(tmp_path.rglob("*"))
    tar_gz(path, {**unsafe, **good}, monkeypatch)
    assert is_whole(small, "test", data.cifar10(path, "test"))
    link = tarfile.TarInfo(name)
    link.type, link.linkname = tarfile.SYMTYPE, str(secret)
    for members in ({"test_batch.bin": b"x"}, {"x": good[name], name: link}):
        tar_gz(path, members, monkeypatch)
        with pytest.raises((FileNotFoundError, ValueError), match=r"holds no regular file|can't be read as a tar\.gz"):
            data.cifar10(path, "test")
    monkeypatch.setattr(cifar, "ARCHIVE_MD5", "0" * 32)
    monkeypatch.setattr(cifar.pooch, "Untar", None)  # not even tried
    with pytest.raises(ValueError, match="has md5"):
        data.cifar10(path, "test")
    assert sorted(tmp_path.rglob("*")) == sorted([*before, path])


# The download.


class Handler(BaseHTTPRequestHandler):
    """Answers with the server's `payload`; its `script` says with which error, or after how many bytes to stop."""

    def do_GET(self):
        server = self.server
        step = server.script.pop(0) if server.script else None
        status = step if step in (404, 503) else 200
        body = server.payload if status < 400 else b""
        sent = body[:step] if step and status < 400 else body
        server.log.append((status, len(sent)))  # before the client can see that it has everything
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(sent)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(small, tmp_path, monkeypatch):
    """The archive of the made-up test split behind a loopback server that keeps a log of its requests."""
    path = tar_gz(tmp_path / "source.tar.gz", official(small), monkeypatch)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.payload, server.script, server.log = path.read_bytes(), [], []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(cifar, "URL", f"http://127.0.0.1:{server.server_port}/cifar-10-binary.tar.gz")
    monkeypatch.setattr(pooch.core.time, "sleep", lambda seconds: None)  # between tries
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
    assert server.log == [(200, len(server.payload))]
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
    assert is_whole(small, "test", data.cifar10(small.binary, "test", download=True))
    assert server.log == []


def test_an_interrupted_download_is_tried_again(server, small, tmp_path):
    """Two connections end early and one request is refused; the fourth try brings everything."""
    server.script = [1000, 503, 70_000]
    assert is_whole(small, "test", data.cifar10(tmp_path / "new", "test", download=True))
    assert server.log == [(200, 1000), (503, 0), (200, 70_000), (200, len(server.payload))]
    assert contents(tmp_path / "new") == ["cifar-10-binary.tar.gz"]


def test_a_download_that_keeps_ending_early_leaves_nothing(server, small, tmp_path):
    server.script = [70_000] * 4
    with pytest.raises(OSError, match=rf"{cifar.URL} could not be fetched"):
        data.cifar10(tmp_path / "new", "test", download=True)
    assert len(server.log) == 4
    assert contents(tmp_path / "new") == []
    assert is_whole(small, "test", data.cifar10(tmp_path / "new", "test", download=True))


def test_ctrl_c_in_a_download_leaves_nothing(server, tmp_path, monkeypatch):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(pooch.downloaders.tqdm, "update", stop)  # with the first piece on the disk
    with pytest.raises(KeyboardInterrupt):
        data.cifar10(tmp_path / "new", "test", download=True)
    assert contents(tmp_path / "new") == []


def test_download_with_the_wrong_checksum_leaves_nothing(server, small, tmp_path):
    right = server.payload
    server.payload = right[:-1] + bytes([right[-1] ^ 1])
    with pytest.raises(ValueError, match=rf"{cifar.URL}: what arrived has another md5 than {cifar.ARCHIVE_MD5}"):
        data.cifar10(tmp_path / "new", "test", download=True)
    assert contents(tmp_path / "new") == []
    server.payload = right
    assert is_whole(small, "test", data.cifar10(tmp_path / "new", "test", download=True))


def test_download_that_is_not_there(server, tmp_path):
    server.script = [404] * 4
    with pytest.raises(OSError, match=rf"{cifar.URL} could not be fetched: 404"):
        data.cifar10(tmp_path / "new", "test", download=True)
    assert contents(tmp_path / "new") == []


def test_download_without_a_network(small, tmp_path, monkeypatch):
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as closed:
        port = closed.server_port
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(cifar, "URL", f"http://127.0.0.1:{port}/x")
    monkeypatch.setattr(pooch.core.time, "sleep", lambda seconds: None)
    with pytest.raises(OSError, match=rf"http://127\.0\.0\.1:{port}/x could not be fetched: .*refused"):
        data.cifar10(tmp_path / "new", "test", download=True)
    assert contents(tmp_path / "new") == []


# The real thing.


@pytest.fixture(scope="module")
def real():
    if not REAL:
        pytest.skip("set MINIDISTILL_CIFAR10 to a folder with CIFAR-10's binary files to run this")
    if not (Path(REAL) / "test_batch.bin").is_file():
        pytest.skip(f"MINIDISTILL_CIFAR10={REAL} holds no binary files (test_batch.bin)")
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


def test_real_corruption_is_noticed(real, tmp_path):
    records = bytearray((real / "test_batch.bin").read_bytes())
    records[12_345_678] ^= 0x10
    (tmp_path / "test_batch.bin").write_bytes(records)
    with pytest.raises(ValueError, match="its test split is not CIFAR-10's"):
        data.cifar10(tmp_path, "test")
    records[12_345_678] ^= 0x10
    shuffled = np.frombuffer(bytes(records), np.uint8).reshape(-1, 3073)[::-1]  # the hash knows no order
    (tmp_path / "test_batch.bin").write_bytes(shuffled.tobytes())
    images, labels = data.cifar10(real, "test")
    again, labels_again = data.cifar10(tmp_path, "test")
    assert torch.equal(images, again.flip(0))
    assert torch.equal(labels, labels_again.flip(0))
