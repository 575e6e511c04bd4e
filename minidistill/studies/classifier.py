"""The stored CIFAR-10 classifier, made again: `minidistill classifier`, a quarter of an hour on one core."""

from __future__ import annotations

import argparse

from minidistill import data
from minidistill.metrics.classifier import CIFAR10_STEPS, save, train_cifar10_classifier
from minidistill.training import checkpoints

__all__ = ["command", "options"]


def options(parser: argparse.ArgumentParser) -> None:
    """What may be asked of it on the command line, besides --out, --seed and --device."""
    parser.add_argument("--root", help="folder or archive of CIFAR-10 (default $MINIDISTILL_CIFAR10)")
    parser.add_argument("--steps", type=int, default=CIFAR10_STEPS, help="of 256 images each")


def command(a: argparse.Namespace) -> None:
    """Train the classifier on CIFAR-10's training images, measure it on the test images and store it."""
    out = checkpoints.writable(a.out)
    images, labels = data.cifar10(a.root, "train")
    model = train_cifar10_classifier(images, labels, steps=a.steps, seed=a.seed, device=a.device)
    model = model.half().float()  # as it will be stored
    test_images, test_labels = data.cifar10(a.root, "test")
    right = [model.recognised(data.to_float(x).to(a.device), y.to(a.device)) * len(x)
             for x, y in zip(test_images.split(500), test_labels.split(500), strict=True)]
    save(out, model, data="cifar10", steps=a.steps, batch_size=256, images_seen=256 * a.steps, seed=a.seed,
         test_accuracy=round(sum(right)) / len(test_images), n_test=len(test_images),
         command=f"minidistill classifier --steps {a.steps} --seed {a.seed}")
