"""CIFAR-10, from the official binary files or their archive.

Every file is checked before it is believed, and at the end the split as a whole is compared with what it should be.
Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pooch
import torch
from torch import Tensor

from minidistill import _validate
from minidistill.data.pixels import smaller

__all__ = [
    "ARCHIVE", "ARCHIVE_MD5", "BATCHES", "CACHE", "CIFAR10_CLASSES", "FOLDER", "PIXELS", "RECORDS", "RECORD_BYTES",
    "RETRIES", "SPLIT_SHA256", "TIMEOUT", "URL", "VARIABLE", "cifar10",
    "cifar10_batches",
]

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
#: The environment variable that says where CIFAR-10 is, and where a download goes if neither it nor `root` does.
VARIABLE = "MINIDISTILL_CIFAR10"
CACHE = pooch.os_cache("minidistill")  # ~/.cache/minidistill on Linux

#: The official binary version: what its page https://www.cs.toronto.edu/~kriz/cifar.html links to and says of it.
URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
ARCHIVE, ARCHIVE_MD5 = "cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"
FOLDER = "cifar-10-batches-bin"
BATCHES = {"train": tuple(f"data_batch_{k}.bin" for k in range(1, 6)), "test": ("test_batch.bin",)}
RECORDS = 10_000  # images in each file
PIXELS = 3 * 32 * 32
RECORD_BYTES = 1 + PIXELS  # the label, then the planes red, green, blue

#: SHA-256 of the sorted SHA-256 digests of a split's records (label byte + 3,072 pixel bytes): it knows every byte but
#: not the order, so that copies whose records were shuffled pass too.
SPLIT_SHA256 = {
    "train": "55a61f79a40ece2ceda9fb5f9f7078f6ea2fc4952489cef56682bcf92cfcc260",
    "test": "325704b01eb92e1e2a6215ae6a916bb7db7de054af0c496be1c7be2e0fcfbf5f",
}

RETRIES, TIMEOUT = 3, 30.0  # of a download: further tries, and seconds of silence after which one gives up


def cifar10(
    root: str | Path | None = None, split: str = "train", download: bool = False, *,
    n: int | None = None, size: int = 32, verify: bool = True,
) -> tuple[Tensor, Tensor]:
    """CIFAR-10: 50,000 training and 10,000 test images of ten classes (Krizhevsky 2009, *Learning Multiple Layers of
    Features from Tiny Images*; https://www.cs.toronto.edu/~kriz/cifar.html).

    Args:
        root: the folder that holds it, or the official archive's path; None: the environment variable
            MINIDISTILL_CIFAR10. What is read is the first of these that is there: `data_batch_1..5.bin` or
            `test_batch.bin` (also in a subfolder `cifar-10-batches-bin`), `cifar-10-binary.tar.gz`.
        split: "train" or "test".
        download: fetch the official archive (170 MB) into the folder if it holds nothing of the split; without root
            and variable into the user's cache folder, `CACHE`. Call it once before starting several processes.
        n: only n images: the first n / 10 of each class, in the files' order.
        size: 32, or 16, 8, ...: each image averaged over blocks of pixels, rounded to bytes.
        verify: compare the split's labels and pixels with CIFAR-10's own hash. False is for your own images in the
            same layout; an archive's md5 is checked even so.
    Returns:
        images (n, 3, size, size), uint8, 0 to 255, contiguous; labels (n,), int64, 0 to 9: places in `CIFAR10_CLASSES`.
        In the files' order.
    Raises:
        ValueError: an unknown split, a bad n or size, nowhere to look, or a file that is not what it should be.
        FileNotFoundError: a file that is missing. OSError: a download that failed.
    """
    _validate.whole("size", size)
    if 32 % size:
        raise ValueError(f"size={size}: wanted 32, 16, 8, 4, 2 or 1")
    total = RECORDS * len(_validate.choose("split", split, BATCHES))
    if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n % 10 or not 10 <= n <= total):
        raise ValueError(f"n={n!r}: wanted a multiple of 10 (as many of each class), 10 to {total}, or None for all")
    read, path = _version(_place(root, download), split, download)
    images, labels = read(path, split)
    if verify and (found := _split_hash(images, labels)) != SPLIT_SHA256[split]:
        raise ValueError(
            f"{path}: its {split} split is not CIFAR-10's, in a label or pixel at least (hash {found}; wanted "
            f"{SPLIT_SHA256[split]}). verify=False reads your own images in the same layout"
        )
    if n is not None:
        chosen = _first_of_each_class(path, labels, n // 10)
        images, labels = images[chosen], labels[chosen]
    return smaller(images, size), labels


def cifar10_batches(root: str | Path | None, numbers: Sequence[int], size: int = 32) -> tuple[Tensor, Tensor]:
    """Only these of the five training files, 1 to 5, for a machine to which not all could be brought; else as
    `cifar10`. Nothing but each file's size and labels can be checked."""
    names = [f"data_batch_{_validate.whole('numbers', number)}.bin" for number in numbers]
    if not names or not set(names) <= set(BATCHES["train"]):
        raise ValueError(f"numbers={list(numbers)}: wanted some of 1 to 5")
    folder = _place(root, False)
    images, labels = _joined([_records(str(_present(folder / name)), (folder / name).read_bytes()) for name in names])
    return smaller(images, size), labels


def _place(root: str | Path | None, download: bool) -> Path:
    place = root if root is not None else os.environ.get(VARIABLE) or (CACHE if download else None)
    if place is None:
        raise ValueError(
            f"root=None and {VARIABLE} is not set: give root= (the folder with CIFAR-10, or its archive's path), "
            f"set {VARIABLE} to it, or give download=True to fetch {URL}"
        )
    return _validate.path("root", place)


def _version(
    place: Path, split: str, download: bool
) -> tuple[Callable[[Path, str], tuple[Tensor, Tensor]], Path]:
    """What reads the split, and from where: the first version of which anything is there (that a part of it is missing
    is then an error, not a reason to look elsewhere), or else the download."""
    if place.is_file():
        return _archive, place
    for folder in (place, place / FOLDER):
        if any((folder / name).exists() for name in BATCHES[split]):
            return _batches, folder
    if (place / ARCHIVE).exists():
        return _archive, place / ARCHIVE
    if download:
        return _archive, _download(place if place.suffix == ".gz" else place / ARCHIVE)
    raise FileNotFoundError(
        f"{place} {f'holds nothing of the {split} split' if place.is_dir() else 'does not exist'}; wanted there "
        f"{', '.join(BATCHES[split])} or {ARCHIVE}. download=True fetches {URL}"
    )


def _present(path: Path) -> Path:
    if not path.is_file():
        beside = sorted(p.name for p in path.parent.glob("*.bin"))
        raise FileNotFoundError(f"{path}: no such file; there are {', '.join(beside) or 'none of its kind'}")
    return path


def _batches(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    return _joined([_records(str(_present(folder / name)), (folder / name).read_bytes()) for name in BATCHES[split]])


def _archive(path: Path, split: str) -> tuple[Tensor, Tensor]:
    """The split's files out of the archive, by way of a temporary folder. Its md5 is looked at first: nothing but the
    official archive is ever unpacked."""
    if (md5 := pooch.file_hash(str(path), "md5")) != ARCHIVE_MD5:
        raise ValueError(f"{path} has md5 {md5}; wanted {ARCHIVE_MD5}: it is truncated, corrupt or another archive")
    wanted = [f"{FOLDER}/{name}" for name in BATCHES[split]]
    with tempfile.TemporaryDirectory() as folder:
        try:
            pooch.Untar(members=wanted, extract_dir=folder)(str(path), "download", None)
        except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path} can't be read as a tar.gz: {error}") from error
        if missing := [name for name in wanted if (file := Path(folder, name)).is_symlink() or not file.is_file()]:
            raise FileNotFoundError(f"{path} holds no regular file {', '.join(missing)}")
        return _joined([_records(f"{path}:{name}", Path(folder, name).read_bytes()) for name in wanted])


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


def _download(archive: Path) -> Path:
    """The official archive under its name once it is complete and its md5 right; of a failed try nothing is left."""
    store = pooch.create(archive.parent, base_url="", urls={archive.name: URL},
                         registry={archive.name: f"md5:{ARCHIVE_MD5}"}, retry_if_failed=RETRIES)
    try:
        return Path(store.fetch(archive.name, downloader=pooch.HTTPDownloader(progressbar=True, timeout=TIMEOUT)))
    except OSError as error:
        raise OSError(f"{URL} could not be fetched: {error}") from error
    except ValueError as error:
        raise ValueError(f"{URL}: what arrived has another md5 than {ARCHIVE_MD5}, and was deleted") from error
