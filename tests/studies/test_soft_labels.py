"""Many classifiers at once: each learns its own images, runs do not touch one another."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from minidistill.studies.soft_labels import BATCH, train_many
from tests.helpers import rng

IMAGES = torch.cat([torch.randn(60, 5, generator=rng(0)) + 2 * k for k in (-1, 1)])
LABELS = torch.arange(2).repeat_interleave(60)
OPTIONS = {"width": 8, "steps": 60, "learning_rate": 3e-2, "classes": 2}


def _hard(logits, at):
    assert logits.shape == (at.numel(), 2)
    assert at.shape[1] == BATCH
    return cross_entropy(logits, LABELS[at.flatten()], reduction="none")


def test_each_run_learns_and_gives_logits_of_all_images():
    seen = torch.stack([torch.randperm(120, generator=rng(k))[:40] for k in range(3)])
    logits = train_many(IMAGES, seen, _hard, generator=rng(1), **OPTIONS)
    assert logits.shape == (3, 120, 2)
    assert ((logits.argmax(2) == LABELS).float().mean(1) > 0.95).all()
    assert not logits.requires_grad


def test_runs_do_not_touch_one_another():
    """Two runs with the same images and the same start, one of which has the labels exchanged."""
    seen = torch.arange(120).repeat(2, 1)

    def loss(logits, at):
        exchanged = torch.stack([LABELS[at[0]], 1 - LABELS[at[1]]]).flatten()
        return cross_entropy(logits, exchanged, reduction="none")

    one, other = train_many(IMAGES, seen, loss, generator=rng(2), starts=1, **OPTIONS)
    assert (one.argmax(1) == LABELS).float().mean() > 0.95
    assert (other.argmax(1) == LABELS).float().mean() < 0.05


def test_starts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="starts=2 does not divide the 3 rows"):
        train_many(IMAGES, torch.zeros(3, 4, dtype=torch.long), _hard, generator=rng(), starts=2, **OPTIONS)
