"""Real images in memory: the digits that come with scikit-learn, and CIFAR-10.

CIFAR-10 is read from whichever form is at hand (the official binary files, their archive, or packed WebP sheets),
every file is checked before it is believed, and at the end the split as a whole is compared with what it should be.
An archive is read in memory and never extracted; nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import time
import zlib
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from tqdm.auto import tqdm

from minidistill import _validate

__all__ = [
    "ARCHIVE", "ARCHIVE_MD5", "ATTEMPTS", "BATCHES", "CACHE", "CIFAR10_CLASSES", "FOLDER", "MANIFEST", "PAUSE",
    "PIXELS", "RECORDS", "RECORD_BYTES", "ROW", "SHEETS", "SMALL_SHEETS", "SPLIT_SHA256", "TIMEOUT", "URL",
    "VARIABLE", "cifar10", "digits", "digits_as_rgb", "random_flip", "to_float",
]

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
#: The environment variable that says where CIFAR-10 is, and where a download goes if neither it nor `root` does.
VARIABLE = "MINIDISTILL_CIFAR10"
CACHE = "~/.cache/minidistill"

#: The official binary version: what its page https://www.cs.toronto.edu/~kriz/cifar.html links to and says of it.
URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
ARCHIVE, ARCHIVE_MD5 = "cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"
FOLDER = "cifar-10-batches-bin"
BATCHES = {"train": tuple(f"data_batch_{k}.bin" for k in range(1, 6)), "test": ("test_batch.bin",)}
RECORDS = 10_000  # images in each file, and on each full sheet
PIXELS = 3 * 32 * 32
RECORD_BYTES = 1 + PIXELS  # the label, then the planes red, green, blue

#: The packed version: lossless WebP sheets of 100 images a row, beside a manifest of their pixels' SHA-256.
SHEETS = {"train": tuple(f"train-{k}.webp" for k in range(5)), "test": ("test.webp",)}
SMALL_SHEETS = {"train": ("ci-train-5000.webp", 5000), "test": ("ci-test-1000.webp", 1000)}  # each class's first images
MANIFEST = "manifest.json"
ROW = 100

#: SHA-256 of the sorted SHA-256 digests of a split's records (label byte + 3,072 pixel bytes): it knows every byte but
#: not the order, which differs between the versions. Computed from sheets whose label-free hash is the published one.
SPLIT_SHA256 = {
    "train": "55a61f79a40ece2ceda9fb5f9f7078f6ea2fc4952489cef56682bcf92cfcc260",
    "test": "325704b01eb92e1e2a6215ae6a916bb7db7de054af0c496be1c7be2e0fcfbf5f",
}

ATTEMPTS, PAUSE, TIMEOUT = 4, 2.0, 30.0  # of a download: tries, then seconds between them and until one gives up


def digits() -> tuple[Tensor, Tensor]:
    """The 1,797 handwritten digits of 8x8 pixels that scikit-learn ships (UCI Optical Recognition of
    Handwritten Digits, Alpaydin & Kaynak 1998).

    Returns:
        images (1797, 1, 8, 8), float32 in [-1, 1]; labels (1797,), int64, 0 to 9.
    """
    images, labels = load_digits(return_X_y=True)  # pixels are whole numbers from 0 to 16
    return torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1, torch.tensor(labels)


def digits_as_rgb(size: int = 32) -> tuple[Tensor, Tensor]:
    """The digits in CIFAR-10's form, for when CIFAR-10 is not at hand: enlarged bilinearly, the same in each channel.

    Returns:
        images (1797, 3, size, size), uint8, 0 to 255; labels (1797,), int64, 0 to 9.
    Raises:
        ValueError: a size that is not a whole number >= 1.
    """
    _validate.whole("size", size)
    images, labels = digits()
    images = torch.nn.functional.interpolate(images, (size, size), mode="bilinear", align_corners=False)
    return ((images + 1) * 127.5).round().to(torch.uint8).repeat(1, 3, 1, 1), labels


def to_float(images: Tensor) -> Tensor:
    """Bytes 0..255 to float32 in [-1, 1], as x / 127.5 - 1; images that are floating already are returned as they are.

    Raises:
        TypeError: any other kind of tensor.
    """
    if images.is_floating_point():
        return images
    if images.dtype != torch.uint8:
        raise TypeError(f"images is a tensor of {images.dtype}; wanted uint8 (0 to 255) or floating point")
    return images.to(torch.float32).div_(127.5).sub_(1)


def random_flip(images: Tensor, rng: torch.Generator) -> Tensor:
    """Each image of (n, c, h, w) mirrored left to right with probability 1/2: a new tensor on the images' device."""
    coins = torch.rand(len(images), generator=rng, device=rng.device) < 0.5
    return torch.where(coins.to(images.device).reshape(-1, 1, 1, 1), images.flip(-1), images)


def cifar10(
    root: str | Path | None = None, split: str = "train", download: bool = False, *,
    n: int | None = None, size: int = 32, verify: bool = True,
) -> tuple[Tensor, Tensor]:
    """CIFAR-10: 50,000 training and 10,000 test images of ten classes (Krizhevsky 2009, *Learning Multiple Layers of
    Features from Tiny Images*; https://www.cs.toronto.edu/~kriz/cifar.html).

    Args:
        root: the folder that holds it, or the official archive's path; None: the environment variable
            MINIDISTILL_CIFAR10. What is read is the first of these that is there: `data_batch_1..5.bin` or
            `test_batch.bin` (also in a subfolder `cifar-10-batches-bin`), lossless WebP sheets `train-0..4.webp` or
            `test.webp` with their `manifest.json`, `cifar-10-binary.tar.gz`.
        split: "train" or "test".
        download: fetch the official archive (170 MB) into the folder if it holds nothing of the split; without root
            and variable into ~/.cache/minidistill. One process at a time: call it once before starting several.
        n: only n images: the first n / 10 of each class, in the files' order. Of the sheets only those needed are read,
            and up to 5,000 / 1,000 images come from `ci-train-5000.webp` / `ci-test-1000.webp` where those exist.
        size: 32, or 16, 8, ...: each image averaged over blocks of pixels, rounded to bytes.
        verify: whenever the whole split was read, compare its labels and pixels with CIFAR-10's own hash. False is for
            your own images in the same layout; an archive's md5 and the sheets' manifest are checked even so.
    Returns:
        images (n, 3, size, size), uint8, 0 to 255, contiguous; labels (n,), int64, 0 to 9: places in `CIFAR10_CLASSES`.
        In the files' order, which differs between the official version and the sheets: shuffle before training.
    Raises:
        ValueError: an unknown split, a bad n, nowhere to look, or a file that is not what it should be.
        FileNotFoundError: a file that is missing. OSError: a download that failed.
    """
    _validate.whole("size", size)
    if 32 % size:
        raise ValueError(f"size={size}: wanted 32, 16, 8, 4, 2 or 1")
    total = RECORDS * len(_validate.choose("split", split, BATCHES))
    if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n % 10 or not 10 <= n <= total):
        raise ValueError(f"n={n!r}: wanted a multiple of 10 (as many of each class) from 10 to {total}, or None for "
                         "all")
    read, path = _version(_place(root, download), split, download)
    images, labels = read(path, split, n)
    if verify and len(labels) == total and (found := _split_hash(images, labels)) != SPLIT_SHA256[split]:
        raise ValueError(
            f"{path}: its {split} split is not CIFAR-10's, in a label or pixel at least (hash {found}; wanted "
            f"{SPLIT_SHA256[split]}). verify=False reads your own images in the same layout"
        )
    if n is not None:
        chosen = _first_of_each_class(path, labels, n // 10)
        images, labels = images[chosen], labels[chosen]
    return smaller(images, size), labels


def smaller(images: Tensor, size: int) -> Tensor:
    """Images (n, c, h, w) as bytes averaged over square blocks to (n, c, size, size), rounded to the nearest byte."""
    block = images.shape[-1] // size
    if block == 1:
        return images
    pool = torch.nn.functional.avg_pool2d  # in parts: floats of all would be four times as many
    parts = [pool(part.float(), block) for part in images.split(5000)]
    return torch.cat([part.add_(0.5).to(torch.uint8) for part in parts])


def _place(root: str | Path | None, download: bool) -> Path:
    place = root if root is not None else os.environ.get(VARIABLE) or (CACHE if download else None)
    if place is None:
        raise ValueError(
            f"root=None and {VARIABLE} is not set: give root= (the folder with CIFAR-10, or its archive's path), "
            f"set {VARIABLE} to it, or give download=True to fetch {URL}"
        )
    return Path(place).expanduser()


def _version(
    place: Path, split: str, download: bool
) -> tuple[Callable[[Path, str, int | None], tuple[Tensor, Tensor]], Path]:
    """What reads the split, and from where: the first version of which anything is there (that a part of it is missing
    is then an error, not a reason to look elsewhere), or else the download."""
    if place.is_file():
        return _archive, place
    for read, path, names in (
        (_batches, place, BATCHES[split]),
        (_batches, place / FOLDER, BATCHES[split]),
        (_sheets, place, SHEETS[split]),
        (_archive, place / ARCHIVE, ("",)),
        (_sheets, place, SMALL_SHEETS[split][:1]),
    ):
        if any((path / name).exists() for name in names):
            return read, path
    if download:
        return _archive, _download(place if place.suffix == ".gz" else place / ARCHIVE)
    raise FileNotFoundError(
        f"{place} {f'holds nothing of the {split} split' if place.is_dir() else 'does not exist'}; wanted there "
        f"{', '.join(BATCHES[split])} or {', '.join(SHEETS[split])} or {ARCHIVE}. download=True fetches {URL}"
    )


def _present(path: Path) -> Path:
    if not path.is_file():
        beside = sorted(p.name for p in path.parent.glob("*") if p.suffix in (".bin", ".webp", ".json"))
        raise FileNotFoundError(f"{path}: no such file; there are {', '.join(beside) or 'none of its kind'}")
    return path


# The official version: files of records, loose or in the archive.


def _batches(folder: Path, split: str, n: int | None) -> tuple[Tensor, Tensor]:
    return _joined([_records(str(_present(folder / name)), (folder / name).read_bytes()) for name in BATCHES[split]])


def _archive(path: Path, split: str, n: int | None) -> tuple[Tensor, Tensor]:
    """The split's files out of the archive, in memory: only regular files of exactly the official names are looked at,
    so whatever else an archive holds (links, names that point outside) can do nothing."""
    data = path.read_bytes()  # once: what is unpacked is what was checked
    if not data.startswith(b"\x1f\x8b"):
        raise ValueError(f"{path} is not a gzip file; wanted the official {ARCHIVE}")
    if (md5 := _md5(data)) != ARCHIVE_MD5:
        raise ValueError(f"{path} has md5 {md5}; wanted {ARCHIVE_MD5}: it is truncated, corrupt or another archive")
    wanted = [f"{FOLDER}/{name}" for name in BATCHES[split]]
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as tar:
            for member in tar:
                if member.isreg() and member.name in wanted and (content := tar.extractfile(member)):
                    found[member.name] = content.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} can't be read as a tar.gz: {error}") from error
    if missing := [name for name in wanted if name not in found]:
        raise FileNotFoundError(f"{path} holds no regular file {', '.join(missing)}")
    return _joined([_records(f"{path}:{name}", found.pop(name)) for name in wanted])


def _records(name: str, data: bytes) -> tuple[Tensor, Tensor]:
    wanted = RECORDS * RECORD_BYTES
    if len(data) != wanted:
        what = "is truncated" if len(data) < wanted else "is too long"
        raise ValueError(f"{name} {what}: it has {len(data)} bytes; wanted {wanted}")
    records = np.frombuffer(data, np.uint8).reshape(RECORDS, RECORD_BYTES)
    labels = records[:, 0].astype(np.int64)
    if labels.max() > 9:
        first = int((labels > 9).argmax())
        raise ValueError(f"{name}: record {first} has label {labels[first]}; wanted 0 to 9")
    return torch.tensor(records[:, 1:].reshape(-1, 3, 32, 32)), torch.tensor(labels)


# The packed version: sheets of images sorted by class, with a manifest.


def _sheets(folder: Path, split: str, n: int | None) -> tuple[Tensor, Tensor]:
    small, size = SMALL_SHEETS[split]
    files = [(small, size)]
    if n is None or n > size or not (folder / small).exists():
        files = [(name, RECORDS) for name in SHEETS[split]][: None if n is None else -(-n // RECORDS)]
    hashes = _manifest(_present(folder / MANIFEST))
    return _joined([_sheet(_present(folder / name), count, hashes) for name, count in files])


def _manifest(path: Path) -> dict[str, str]:
    """SHA-256 of the pixels by file name."""
    try:
        files = json.loads(path.read_bytes())["files"]
        return {name: str(about["pixels_sha256"]) for name, about in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} lacks files -> name -> pixels_sha256: {error!r}") from error


def _sheet(path: Path, count: int, hashes: dict[str, str]) -> tuple[Tensor, Tensor]:
    if path.name not in hashes:
        raise ValueError(f"{path.parent / MANIFEST} is without {path.name}; it knows {', '.join(hashes) or 'none'}")
    try:
        with Image.open(path, formats=["WEBP"]) as picture:
            if picture.size != (ROW * 32, count // ROW * 32):  # before the pixels are decoded
                raise ValueError(
                    f"{path} is {picture.size[0]} x {picture.size[1]} pixels; wanted {ROW * 32} x {count // ROW * 32}"
                )
            pixels = np.asarray(picture.convert("RGB"))
    except (OSError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} can't be decoded as WebP: {error}") from error
    images = np.ascontiguousarray(pixels.reshape(-1, 32, ROW, 32, 3).swapaxes(1, 2)).reshape(count, 32, 32, 3)
    if (found := hashlib.sha256(images.tobytes()).hexdigest()) != hashes[path.name]:
        raise ValueError(f"{path} is corrupt: its pixels have SHA-256 {found}; {MANIFEST} says {hashes[path.name]}")
    return torch.tensor(images).permute(0, 3, 1, 2).contiguous(), torch.arange(10).repeat_interleave(count // 10)


def _joined(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    images, labels = zip(*parts, strict=True)
    return torch.cat(images), torch.cat(labels)


def _first_of_each_class(path: Path, labels: Tensor, each: int) -> Tensor:
    """Where the first `each` images of every class are, ascending."""
    chosen = [(labels == label).nonzero()[:each, 0] for label in range(10)]
    for name, found in zip(CIFAR10_CLASSES, chosen, strict=True):
        if len(found) < each:
            raise ValueError(f"{path} has {len(found)} images of class {name}; n={10 * each} wants {each}")
    return torch.cat(chosen).sort().values


def _split_hash(images: Tensor, labels: Tensor) -> str:
    records = torch.cat([labels.to(torch.uint8)[:, None], images.flatten(1)], 1).numpy()
    return hashlib.sha256(b"".join(sorted(hashlib.sha256(record).digest() for record in records))).hexdigest()


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()  # the checksum that the official page gives


def _download(archive: Path) -> Path:
    """The official archive under its name once its md5 is right; until then a `.partial` file, which is resumed."""
    partial = archive.with_name(archive.name + ".partial")
    for attempt in range(ATTEMPTS):
        try:
            _fetch_rest(partial)
            break
        except (OSError, HTTPException) as error:
            hopeless = isinstance(error, HTTPError) and error.code < 500  # such as 404: asking again won't help
            if hopeless or attempt == ATTEMPTS - 1:
                kept = f"; what has arrived is kept in {partial} and resumed next time" if partial.exists() else ""
                raise OSError(f"{URL} could not be fetched: {error}{kept}") from error
            time.sleep(PAUSE)
    if (md5 := _md5(partial.read_bytes())) != ARCHIVE_MD5:
        partial.unlink()
        raise ValueError(f"{URL}: what arrived has md5 {md5}; wanted {ARCHIVE_MD5}. It was deleted")
    os.replace(partial, archive)
    return archive


def _fetch_rest(partial: Path) -> None:
    """One request for what the partial file lacks; OSError if the connection ends early."""
    start = partial.stat().st_size if partial.exists() else 0
    request = Request(URL, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        reply = urlopen(request, timeout=TIMEOUT)
    except HTTPError as error:
        error.close()
        if start and error.code == 416:  # nothing lies beyond what we have: the md5 will tell whether that is right
            return
        raise
    with reply:
        if not reply.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            start = 0  # the server ignores Range and sends everything
        length = reply.headers.get("Content-Length")
        total = start + int(length) if length else None
        partial.parent.mkdir(parents=True, exist_ok=True)
        with (
            open(partial, "ab" if start else "wb") as file,
            tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=ARCHIVE) as bar,
        ):
            while block := reply.read(1 << 16):
                bar.update(file.write(block))
    if total is not None and partial.stat().st_size < total:
        raise OSError(f"the connection ended after {partial.stat().st_size} of {total} bytes")
