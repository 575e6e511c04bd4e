"""Your own images: a folder of pictures, one subfolder a class where there are classes, or arrays in an .npz file."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm.auto import tqdm

from minidistill import _validate

__all__ = ["DAMAGED", "MANY", "SUFFIXES", "WANTED", "images"]

#: What Pillow and NumPy raise for a file that is damaged, or something else.
DAMAGED = (
    OSError, ValueError, TypeError, AttributeError, KeyError, EOFError, SyntaxError, NotImplementedError, MemoryError,
    struct.error, zlib.error, zipfile.BadZipFile, Image.DecompressionBombError,
)
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MANY = 500  # so many files or more get a progress bar
WANTED = "a folder of PNG, JPEG or WebP files, or an .npz file with the array 'images'"


def images(source: str | Path, size: int | None = None) -> tuple[Tensor, Tensor | None]:
    """Your own images, as `train_denoiser` takes them.

    Args:
        source: a folder of PNG, JPEG or WebP files. With a subfolder for each class, the classes are numbered in the
            order of their names, 0, 1, ...; without subfolders there are no classes. Or an .npz file: "images" (or
            "x"), whole numbers 0 to 255 of shape (n, h, w), (n, h, w, c) or (n, c, h, w) with c = 1 or 3, and perhaps
            "labels" (or "y"), whole numbers (n,). Nothing is ever unpickled.
        size: scale each image so that its shorter side has so many pixels, and cut off what the longer side has more,
            half at either end. None: as they are, which must be of one size.
    Returns:
        images (n, c, h, w), uint8, 0 to 255, in the order of the files' names: c is 1 if all are grey, else 3; what is
        transparent becomes white. labels (n,), int64, or None where there are no classes, or only one, which would
        tell a network nothing.
    Raises:
        ValueError, TypeError: a bad size, nothing to read, several sizes without `size`, a file or an array that is
            not what it should be, which is named. FileNotFoundError: nothing is there.
    """
    if size is not None:
        _validate.whole("size", size)
    path = _validate.path("source", source)
    if path.is_dir():
        return _of_folder(path, size)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; wanted {WANTED}")
    if path.suffix != ".npz":
        raise ValueError(f"{path} is neither a folder nor an .npz file; wanted {WANTED}")
    return _of_arrays(path, size)


# A folder of pictures.


def _of_folder(folder: Path, size: int | None) -> tuple[Tensor, Tensor | None]:
    files, labels = _listed(folder)
    channels = 1 if all([_is_grey(file) for file in _bar(files, "looking at")]) else 3
    out, first = torch.empty(0), files[0]
    for i, file in enumerate(_bar(files, "reading")):
        with _opened(file) as picture:
            pixels = _pixels(picture, channels, size)
        if not i:
            out = torch.empty(len(files), *pixels.shape, dtype=torch.uint8)
        if pixels.shape != out.shape[1:]:
            a, b = (f"{name} has {shape[2]} x {shape[1]} pixels" for name, shape in
                    ((first.name, out.shape[1:]), (file.name, pixels.shape)))
            raise ValueError(f"{folder}: {a}, {b}; wanted one size, or size=N to make all N x N")
        out[i] = torch.from_numpy(pixels)
    return out, labels


def _listed(folder: Path) -> tuple[list[Path], Tensor | None]:
    """All pictures in order, and their classes. ValueError if there are none, or if it is not clear what a class is."""
    flat = _pictures(folder.iterdir())
    classes = sorted(each for each in folder.iterdir() if each.is_dir() and not each.name.startswith("."))
    of_class = [_pictures(each.rglob("*")) for each in classes]
    if flat and any(of_class):
        raise ValueError(f"{folder} has images beside the folder {classes[0].name}; wanted all of them in folders, one "
                         "a class, or none")
    if flat:
        return flat, None
    if not any(of_class):
        raise ValueError(f"{folder} holds no image; wanted {WANTED}")
    for each, found in zip(classes, of_class, strict=True):
        if not found:
            raise ValueError(f"{each} holds no image; wanted some of each class, or not its folder")
    counts = torch.tensor([len(found) for found in of_class])
    labels = torch.arange(len(classes)).repeat_interleave(counts) if len(classes) > 1 else None
    return [file for found in of_class for file in found], labels


def _pictures(paths: Iterable[Path]) -> list[Path]:
    return sorted(path for path in paths
                  if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file())


def _bar(files: list[Path], what: str) -> Iterable[Path]:
    return tqdm(files, desc=f"{what} images", unit="file", disable=len(files) < MANY)


@contextmanager
def _opened(file: Path) -> Iterator[Image.Image]:
    """The picture in a file; whatever is wrong with it becomes a ValueError that names it."""
    try:
        with Image.open(file, formats=["PNG", "JPEG", "WEBP"]) as picture:
            yield picture
    except DAMAGED as error:
        raise ValueError(f"{file} can't be read: {error}") from error


def _is_grey(file: Path) -> bool:
    with _opened(file) as picture:
        if picture.mode.startswith(("I", "F")):  # Pillow would cut off what is above 255
            raise ValueError(f"it has more than 8 bits a channel (mode {picture.mode})")
        return picture.mode in ("1", "L", "LA")


def _pixels(picture: Image.Image, channels: int, size: int | None) -> np.ndarray:
    """(channels, h, w), uint8, the way up that the camera meant."""
    picture = ImageOps.exif_transpose(picture)
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
    picture = picture.convert("L" if channels == 1 else "RGB")
    if size is not None:
        picture = ImageOps.fit(picture, (size, size))
    return np.array(picture).reshape(picture.height, picture.width, channels).transpose(2, 0, 1)


# Arrays in a file.


def _of_arrays(path: Path, size: int | None) -> tuple[Tensor, Tensor | None]:
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            names = [next((name for name in pair if name in file), None) for pair in (("images", "x"), ("labels", "y"))]
            pixels, classes = (None if name is None else np.asarray(file[name]) for name in names)
            there = ", ".join(map(repr, file)) or "nothing"
    except DAMAGED as error:
        raise ValueError(f"{path} can't be read: {error}") from error
    if pixels is None:
        raise ValueError(f"{path} holds {there}; wanted 'images' (or 'x') and perhaps 'labels' (or 'y')")
    out = _as_images(f"{names[0]!r} of {path}", pixels)
    if size is not None and out.shape[2:] != (size, size):
        channels = out.shape[1]
        pictures = (Image.fromarray(each[0] if channels == 1 else each.transpose(1, 2, 0)) for each in out)
        out = np.stack([_pixels(each, channels, size) for each in pictures])
    if classes is None:
        return torch.from_numpy(out), None
    if classes.dtype.kind not in "iu":
        raise TypeError(f"{names[1]!r} of {path} is an array of {classes.dtype}; wanted whole numbers")
    labels = torch.from_numpy(classes.astype(np.int64))
    _validate.labels(f"{names[1]!r} of {path}", labels, len(out))
    return torch.from_numpy(out), labels if int(labels.max()) else None


def _as_images(name: str, array: np.ndarray) -> np.ndarray:
    """The array as (n, c, h, w), uint8; TypeError, ValueError if it is no images."""
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} is an array of {array.dtype}; wanted whole numbers 0 to 255, such as uint8")
    shape = array.shape
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and array.shape[1] not in (1, 3):
        array = array.transpose(0, 3, 1, 2)
    if array.ndim != 4 or array.shape[1] not in (1, 3) or not array.size:
        raise ValueError(f"{name} has shape {shape}; wanted (n, h, w), or (n, h, w, c) or (n, c, h, w) with c = 1 or 3")
    if array.dtype != np.uint8 and (array.min() < 0 or array.max() > 255):
        raise ValueError(f"{name} runs from {array.min()} to {array.max()}; wanted 0 to 255")
    return np.ascontiguousarray(array, dtype=np.uint8)
