"""Real images in memory: the digits that come with scikit-learn, CIFAR-10, and your own.

    bundled.py   `digits`, and the same enlarged to CIFAR-10's form
    cifar.py     `cifar10`, from the official binary files or their archive, downloaded if wanted
    folders.py   `images`: a folder of pictures, or arrays in a file
    pixels.py    what is done to images: bytes to floats, mirrored, averaged to a smaller size
"""

from minidistill.data.bundled import digits, digits_as_rgb
from minidistill.data.cifar import CIFAR10_CLASSES, VARIABLE, cifar10, cifar10_batches
from minidistill.data.folders import images
from minidistill.data.pixels import random_flip, smaller, to_float

__all__ = [
    "CIFAR10_CLASSES", "VARIABLE", "cifar10", "cifar10_batches", "digits", "digits_as_rgb", "images",
    "random_flip", "smaller", "to_float",
]
