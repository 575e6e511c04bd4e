"""Your own images: folders of pictures with and without classes, arrays in a file, and what is wrong with either."""

import io
import pickle
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from minidistill import data
from minidistill.data import folders


def random_pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def put(path, pixels, mode=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(pixels)
    (picture.convert(mode) if mode else picture).save(path, **options)
    return path


def colours(tmp_path, n=3, h=4, w=5):
    """n colour pictures, (n, 3, h, w), in classes b (all but the last) and a (the last)."""
    pixels = random_pixels(n, h, w, 3)
    for i, each in enumerate(pixels):
        put(tmp_path / ("a" if i == n - 1 else "b") / f"{i}.png", each)
    return pixels.transpose(0, 3, 1, 2)


def test_class_folders_are_numbered_by_name(tmp_path):
    pixels = colours(tmp_path)
    put(tmp_path / "b" / "deeper" / "9.png", random_pixels(4, 5, 3, seed=1))
    images, labels = data.images(tmp_path)
    assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
    assert images.is_contiguous()
    assert labels.tolist() == [0, 1, 1, 1]
    assert np.array_equal(images[:3], pixels[[2, 0, 1]])
    again, labels_again = data.images(str(tmp_path))
    assert torch.equal(images, again)
    assert torch.equal(labels, labels_again)


def test_without_classes_or_with_one_there_are_no_labels(tmp_path):
    pixels = random_pixels(12, 4, 4)
    for i, each in enumerate(pixels):
        put(tmp_path / "one" / f"{i:02}.PNG", each)
    put(tmp_path / "one" / ".hidden.png", pixels[0])
    (tmp_path / "one" / "notes.txt").write_text("no picture")
    (tmp_path / ".thumbnails").mkdir()
    for folder in (tmp_path, tmp_path / "one"):
        images, labels = data.images(folder)
        assert labels is None
        assert np.array_equal(images, pixels[:, None])  # grey stays one channel


@pytest.mark.parametrize(("suffix", "options"), [
    ("png", {}), ("webp", {"lossless": True}), ("jpg", {"quality": 95}), ("JPEG", {"quality": 95}),
])
def test_formats(suffix, options, tmp_path):
    smooth = np.linspace(0, 255, 16 * 16 * 3).reshape(16, 16, 3).astype(np.uint8)
    put(tmp_path / f"x.{suffix}", smooth, format="jpeg" if suffix == "JPEG" else None, **options)
    images, _ = data.images(tmp_path)
    assert images.shape == (1, 3, 16, 16)
    apart = np.abs(images[0].numpy().astype(int) - smooth.transpose(2, 0, 1)).max()
    assert apart <= (0 if suffix in ("png", "webp") else 12)


def test_grey_beside_colour_transparency_and_palettes(tmp_path):
    grey, colour = random_pixels(4, 4), random_pixels(4, 4, 3)
    put(tmp_path / "0.png", grey)
    put(tmp_path / "1.png", np.dstack([colour, np.full((4, 4), 255, np.uint8)]))
    put(tmp_path / "2.png", np.dstack([colour, np.zeros((4, 4), np.uint8)]))
    put(tmp_path / "3.png", colour, "P")
    put(tmp_path / "4.png", np.dstack([grey, np.zeros((4, 4), np.uint8)]))
    images, _ = data.images(tmp_path)
    assert np.array_equal(images[0], np.broadcast_to(grey, (3, 4, 4)))
    assert np.array_equal(images[1], colour.transpose(2, 0, 1))
    assert (images[[2, 4]] == 255).all()
    assert np.array_equal(images[3], np.asarray(Image.open(tmp_path / "3.png").convert("RGB")).transpose(2, 0, 1))
    (tmp_path / "1.png").unlink()
    (tmp_path / "2.png").unlink()
    (tmp_path / "3.png").unlink()
    assert data.images(tmp_path)[0].shape == (2, 1, 4, 4)


def test_a_camera_held_sideways(tmp_path):
    pixels = np.linspace(0, 255, 24).reshape(4, 6).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    put(tmp_path / "x.png", pixels, exif=exif)
    assert np.array_equal(data.images(tmp_path)[0][0, 0], np.rot90(pixels, -1))


def test_size_scales_and_crops(tmp_path):
    wide, tall, right = random_pixels(8, 20, 3), random_pixels(20, 8, 3), random_pixels(4, 4, 3)
    for name, pixels in (("0", wide), ("1", tall), ("2", right)):
        put(tmp_path / f"{name}.png", pixels)
    images, _ = data.images(tmp_path, 4)
    assert images.shape == (3, 3, 4, 4)
    middles = ((wide, (6, 0, 14, 8)), (tall, (0, 6, 8, 14)), (right, (0, 0, 4, 4)))
    for image, (pixels, box) in zip(images, middles, strict=True):
        wanted = np.asarray(Image.fromarray(pixels).resize((4, 4), Image.Resampling.BICUBIC, box))
        assert np.array_equal(image, wanted.transpose(2, 0, 1))
    with pytest.raises(ValueError, match=r"0\.png has 20 x 8 pixels, 1\.png has 8 x 20 pixels; wanted one size, or si"):
        data.images(tmp_path)
    for size in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match=f"size={size}: wanted a whole number"):
            data.images(tmp_path, size)


def test_a_bar_for_many_files(tmp_path, monkeypatch, capsys):
    put(tmp_path / "x.png", random_pixels(4, 4))
    data.images(tmp_path)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(folders, "MANY", 1)
    data.images(tmp_path)
    assert "reading images: 100%" in capsys.readouterr().err


def test_folders_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist; wanted a folder of PNG"):
        data.images(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds no image; wanted a folder of PNG"):
        data.images(tmp_path)
    (tmp_path / "x.gif").write_bytes(b"GIF89a")
    with pytest.raises(ValueError, match=r"holds no image"):
        data.images(tmp_path)
    with pytest.raises(ValueError, match=r"x\.gif is neither a folder nor an \.npz file"):
        data.images(tmp_path / "x.gif")
    put(tmp_path / "a" / "x.png", random_pixels(4, 4))
    (tmp_path / "b").mkdir()
    with pytest.raises(ValueError, match=r"b holds no image; wanted some of each class"):
        data.images(tmp_path)
    put(tmp_path / "x.png", random_pixels(4, 4))
    with pytest.raises(ValueError, match=r"has images beside the folder a; wanted all of them in folders"):
        data.images(tmp_path)


def test_unreadable_pictures_are_named(tmp_path):
    put(tmp_path / "0.png", random_pixels(40, 40, 3))
    good = (tmp_path / "0.png").read_bytes()
    jpeg, gif = io.BytesIO(), io.BytesIO()
    Image.fromarray(random_pixels(40, 40, 3)).save(jpeg, "JPEG")
    Image.fromarray(random_pixels(4, 4)).save(gif, "GIF")
    for bad in (b"", b"text", good[:20], good[: len(good) // 2], jpeg.getvalue()[:500], gif.getvalue()):
        (tmp_path / "1.png").write_bytes(bad)
        with pytest.raises(ValueError, match=r"1\.png can't be read: "):
            data.images(tmp_path)
    put(tmp_path / "1.png", random_pixels(40, 40).astype(np.uint16) * 100)
    with pytest.raises(ValueError, match=r"1\.png can't be read: it has more than 8 bits a channel"):
        data.images(tmp_path)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_damaged_pictures_raise_nothing_else(form, tmp_path):
    """Single bytes changed at random: a picture, or a ValueError with its name."""
    buffer = io.BytesIO()
    Image.fromarray(random_pixels(8, 8, 3)).save(buffer, form)
    rng, path = np.random.default_rng(0), tmp_path / f"x.{form.lower()}"
    for _ in range(150):
        damaged = bytearray(buffer.getvalue())
        damaged[rng.integers(len(damaged))] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of large pictures and odd metadata
            try:
                images, _ = data.images(tmp_path, 4)
            except ValueError as error:
                assert path.name in str(error)  # noqa: PT017
            else:
                assert images.shape[2:] == (4, 4)


# Arrays in a file.


@pytest.mark.parametrize("keys", [("images", "labels"), ("x", "y")])
@pytest.mark.parametrize("layout", ["n h w", "n h w 1", "n 1 h w", "n h w 3", "n 3 h w"])
def test_arrays(keys, layout, tmp_path):
    n, h, w = 6, 4, 5
    c = 3 if "3" in layout else 1
    pixels = random_pixels(n, c, h, w)
    array = {"n h w": pixels[:, 0], f"n h w {c}": pixels.transpose(0, 2, 3, 1)}.get(layout, pixels)
    classes = np.arange(n, dtype=np.int16) % 3
    np.savez(tmp_path / "x.npz", **{keys[0]: array.astype(np.int64), keys[1]: classes})
    images, labels = data.images(tmp_path / "x.npz")
    assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
    assert np.array_equal(images, pixels)
    assert labels.tolist() == classes.tolist()
    np.savez_compressed(tmp_path / "x.npz", **{keys[0]: array})
    assert data.images(tmp_path / "x.npz")[1] is None
    small, _ = data.images(tmp_path / "x.npz", 2)
    for image, each in zip(small, pixels, strict=True):
        picture = Image.fromarray(each[0] if c == 1 else each.transpose(1, 2, 0))
        wanted = np.asarray(ImageOps.fit(picture, (2, 2))).reshape(2, 2, c).transpose(2, 0, 1)
        assert np.array_equal(image, wanted)


@pytest.mark.parametrize(("arrays", "error", "words"), [
    ({}, ValueError, r"holds nothing; wanted 'images'"),
    ({"pictures": 1}, ValueError, r"holds 'pictures'; wanted 'images'"),
    ({"images": np.zeros((2, 4, 4))}, TypeError, r"'images' of .*x\.npz is an array of float64; wanted whole numbers"),
    ({"x": np.zeros((2, 4, 4), bool)}, TypeError, r"'x' of .* is an array of bool"),
    ({"x": np.full((2, 4, 4), 256)}, ValueError, r"runs from 256 to 256; wanted 0 to 255"),
    ({"x": np.full((2, 4, 4), -1)}, ValueError, r"runs from -1 to -1; wanted 0 to 255"),
    ({"x": np.zeros((4, 4), int)}, ValueError, r"has shape \(4, 4\); wanted \(n, h, w\)"),
    ({"x": np.zeros((2, 4, 4, 2), int)}, ValueError, r"has shape \(2, 4, 4, 2\); wanted \(n, h, w\)"),
    ({"x": np.zeros((0, 4, 4), int)}, ValueError, r"has shape \(0, 4, 4\)"),
    ({"x": np.zeros((2, 4, 4), int), "y": np.zeros(2)}, TypeError, r"'y' of .* is an array of float64; wanted whole"),
    ({"x": np.zeros((2, 4, 4), int), "y": np.array(["a", "b"])}, TypeError, r"'y' of .* is an array of <U1"),
    ({"x": np.zeros((2, 4, 4), int), "y": np.zeros(3, int)}, ValueError, r"'y' of .*; wanted an integer tensor of sh"),
    ({"x": np.zeros((2, 4, 4), int), "labels": np.array([0, -1])}, ValueError, r"'labels' of .* runs from -1 to 0"),
    ({"images": np.array([{}])}, ValueError, r"x\.npz can't be read: .*allow_pickle"),
])
def test_arrays_that_are_no_images(arrays, error, words, tmp_path):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(error, match=words):
        data.images(tmp_path / "x.npz")


def test_files_that_hold_no_arrays(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, images=random_pixels(10, 8, 8))
    good, single = path.read_bytes(), io.BytesIO()
    np.save(single, random_pixels(4, 4))
    for bad in (b"", b"text", good[:100], good[:-40], good[:150] + b"\xff" * 40 + good[190:], pickle.dumps([1]),
                single.getvalue()):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=r"x\.npz can't be read: "):
            data.images(path)
