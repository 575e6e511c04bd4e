"""Sums over pairs: the small parts that kernels and transport are built of."""

import math

import pytest
import torch

from minidistill.transport import _pairs
from minidistill.transport._pairs import (
    by_rows,
    distances,
    in_units,
    largest,
    medians,
    probabilities,
    squared_distances,
)
from tests.helpers import f64, normal


def test_largest_is_in_absolute_value_and_1_for_zeros():
    assert largest(f64([[-3.0, 1.0]])) == 3
    assert largest(torch.zeros(2, 2)) == 1


def test_units_are_bandwidths_about_the_common_median():
    x, y = normal(7, 2, 3) + 40, normal(4, 2, 3, seed=1) + 40
    both = torch.cat([x, y]).flatten(1)
    u, v = in_units(2.0, x, y)
    torch.testing.assert_close(torch.cat([u, v]), (both - both.median(0).values) / 2)
    assert not medians(x.requires_grad_()).requires_grad
    far, _ = in_units(1e-300, x, y)
    assert float(far.detach().abs().max()) == 1e15


def test_probabilities_are_scaled_and_checked():
    x = normal(4, 2)
    torch.testing.assert_close(probabilities("w", None, x), f64([0.25] * 4))
    torch.testing.assert_close(probabilities("w", torch.tensor([1, 0, 2, 5]), x), f64([0.125, 0, 0.25, 0.625]))


@pytest.mark.parametrize(("weights", "message"), [
    (f64([1.0, 1.0]), r"w is \(2,\); wanted a tensor \(3,\)"),
    ([1.0, 1.0, 1.0], r"w is \[1.0, 1.0, 1.0\]; wanted a tensor"),
    (f64([1.0, math.nan, 1.0]), "w holds a NaN"),
    (f64([1.0, -1.0, 1.0]), "w: wanted numbers >= 0, not all 0"),
    (f64([0.0, 0.0, 0.0]), "w: wanted numbers >= 0, not all 0"),
])
def test_bad_weights_are_named(weights, message):
    with pytest.raises(ValueError, match=message):
        probabilities("w", weights, normal(3, 2))


def test_squared_distances_are_a_product_where_that_is_exact_enough(monkeypatch):
    x, y = normal(30, 5, dtype=torch.float32), normal(20, 5, seed=1, dtype=torch.float32)
    wanted = (x.double()[:, None] - y.double()).square().sum(2)
    torch.testing.assert_close(squared_distances(x + 1e4, y + 1e4).double(), wanted, rtol=1e-2, atol=1e-2)
    assert float(squared_distances(10 * x, 10 * x).min()) == 0  # rounding of the product goes below
    monkeypatch.setattr(_pairs, "distances", None)  # near the origin the slow way is not gone
    torch.testing.assert_close(squared_distances(x, y).double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.5])
def test_distances_have_gradient_0_where_points_coincide(alpha):
    x = f64([[0.0, 0.0], [3.0, 4.0]]).requires_grad_()
    value = distances(x, f64([[0.0, 0.0]]), alpha)
    torch.testing.assert_close(value.detach(), f64([[0.0], [5.0**alpha]]))
    slope = alpha * 5 ** (alpha - 1)
    torch.testing.assert_close(torch.autograd.grad(value.sum(), x)[0], f64([[0.0, 0.0], [0.6 * slope, 0.8 * slope]]))


@pytest.mark.parametrize(("chunk", "blocks"), [(3, [3, 3, 1]), (None, [2, 2, 2, 1]), (7, [7])])
def test_rows_come_in_blocks_that_are_computed_again_backward(monkeypatch, chunk, blocks):
    """ENTRIES = 9 is two rows of four. Several blocks: each is computed twice, so none has to be remembered."""
    monkeypatch.setattr(_pairs, "ENTRIES", 9)
    x, seen = normal(7, 4).requires_grad_(), []

    def f(rows):
        seen.append(len(x[rows]))
        return x[rows].square().sum()

    total = torch.stack(by_rows(f, 7, 4, chunk)).sum()
    assert seen == blocks
    torch.testing.assert_close(torch.autograd.grad(total, x)[0], 2 * x.detach())
    assert sorted(seen) == sorted(blocks if len(blocks) == 1 else 2 * blocks)
    assert [len(x[rows]) for rows in by_rows(lambda rows: rows, 7, 100, None)] == [1] * 7  # never no row
