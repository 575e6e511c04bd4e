"""The digits, and what is done to images."""

import pytest
import torch

from minidistill import data


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
