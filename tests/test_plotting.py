"""Figures: the axes that come back, what is drawn on them, and what is refused."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb

from minidistill import plotting
from minidistill.distributions import ring
from tests.helpers import mixture_1d, rng


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


SAMPLES = torch.randn(50, 2, generator=rng())
LINES = {"ours": ([1, 10, 100], [1.0, 0.5, 0.25]), "theirs": ([1, 10], [2.0, 1.0])}
IMAGES = torch.linspace(-1, 1, 5).reshape(5, 1, 1, 1).expand(5, 1, 2, 3)
CALLS = {
    "density": lambda ax: plotting.density(ring(), ax),
    "scatter": lambda ax: plotting.scatter(SAMPLES, ax),
    "field": lambda ax: plotting.field(SAMPLES, SAMPLES, ax),
    "curves": lambda ax: plotting.curves(LINES, ax),
    "dots": lambda ax: plotting.dots({"a": [1.0, 2.0]}, ax),
    "image_grid": lambda ax: plotting.image_grid(IMAGES, ax),
    "class_grid": lambda ax: plotting.class_grid(IMAGES[:4], ["cat", "dog"], ax),
    "labelled_rows": lambda ax: plotting.labelled_rows({"ours": IMAGES[:2], "theirs": IMAGES[2:4]}, ax),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_given_axes_are_used_and_new_ones_made(name):
    ax = plt.subplots()[1]
    assert CALLS[name](ax) is ax
    assert ax.has_data()
    assert len(plt.get_fignums()) == 1
    new = CALLS[name](None)
    assert new is not ax
    assert new.has_data()
    assert len(plt.get_fignums()) == 2


def test_scatter_shows_the_first_points_over_the_target():
    ax = plotting.scatter(SAMPLES, title="ours", n=20)
    (points,) = ax.collections
    np.testing.assert_allclose(points.get_offsets(), SAMPLES[:20].numpy(), rtol=1e-6)
    assert (ax.get_title(), ax.get_xlabel(), ax.get_ylabel()) == ("ours", "$x_1$", "$x_2$")
    limit = 1.1 * float(SAMPLES[:20].abs().max())
    assert ax.get_xlim() == ax.get_ylim() == pytest.approx((-limit, limit))
    assert ax.get_aspect() == 1
    over = plotting.scatter(SAMPLES, target=ring(radius=2.0, std=0.2), color="red")
    assert over.get_xlim() == pytest.approx((-2.8, 2.8))  # the outermost mean and four standard deviations
    assert len(over.collections) > 1
    assert tuple(over.collections[0].get_facecolor()[0][:3]) == to_rgb("red")
    assert plotting.scatter(SAMPLES, limit=5.0).get_xlim() == (-5, 5)
    assert plotting.scatter(SAMPLES.clone().requires_grad_()).collections  # a graph is no obstacle


def test_curves_have_their_own_looks_and_a_legend():
    ax = plotting.curves(LINES, goal=0.3, xlabel="calls", ylabel="error", styles={"theirs": {"color": "red"}})
    ours, theirs, goal = ax.get_lines()
    np.testing.assert_allclose(ours.get_xydata(), np.transpose(LINES["ours"]))
    assert (ours.get_linestyle(), theirs.get_linestyle()) == ("-", "--")
    assert to_rgb(ours.get_color()) == plotting.PALETTE[0]
    assert theirs.get_color() == "red"
    assert list(goal.get_ydata()) == [0.3, 0.3]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["ours", "theirs", "0.3"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("calls", "error")
    assert (ax.get_xscale(), ax.get_yscale()) == ("linear", "log")
    other = plotting.curves(LINES, log=False, xlog=True)
    assert (other.get_xscale(), other.get_yscale()) == ("log", "linear")
    assert (other.get_xlabel(), other.get_ylabel()) == ("step", "KL(p || q), nats")


def test_dots_are_runs_their_median_and_those_lost():
    runs = {"few": [1.0, 5.0, 2.0], "lost": [3.0, 700.0, float("nan")], "none": [float("inf")]}
    ax = plotting.dots(runs, most=10, title="runs", xlabel="error")
    assert [label.get_text() for label in ax.get_yticklabels()] == list(runs)
    assert ax.get_ylim() == (2.5, -0.5)  # the first on top
    found = [points.get_offsets() for points in ax.collections]
    assert sorted(found[0][:, 0].tolist()) == [1, 2, 5]
    assert all(abs(found[0][:, 1]) < 0.2)
    assert found[2][:, 0].tolist() == [3]
    assert [len(points) for points in found] == [3, 0, 1, 2, 0, 1]  # runs, then crosses, row by row
    assert [line.get_xdata()[0] for line in ax.get_lines()] == [2]  # most of "lost" is infinite, and so its median
    assert [line.get_xdata()[0] for line in plotting.dots({"a": [3.0, 1.0, 99.0]}, most=10).get_lines()] == [3]
    assert plotting.dots({"nothing yet": []}).get_xscale() == "linear"
    assert (ax.get_xscale(), ax.get_xlabel(), ax.get_title()) == ("log", "error", "runs")
    again = plotting.dots({name: [1.5] for name in runs}, ax, log=False, filled=False, color="red")
    assert again is ax
    assert ax.collections[-2].get_facecolor().size == 0
    everything = plotting.dots({"a": [1.0, 1e6]})
    assert len(everything.collections[0].get_offsets()) == 2


def test_a_very_short_log_axis_has_few_numbers():
    ax = plotting.dots({"a": [0.21, 0.3, 0.33]})
    ax.figure.canvas.draw()
    labels = [text.get_text() for text in ax.get_xticklabels(which="both") if text.get_text()]
    assert 2 <= len(labels) <= 6


def test_a_short_log_axis_has_plain_numbers():
    short = plotting.curves({"a": ([1, 2], [0.5, 2.0])})
    short.figure.canvas.draw()
    assert {text.get_text() for text in short.get_yticklabels(which="both")} >= {"0.5", "1", "2"}
    long = plotting.curves({"a": ([1, 2], [1e-3, 1e3])})
    long.figure.canvas.draw()
    assert any("10^" in text.get_text() for text in long.get_yticklabels())


def test_images_stand_row_by_row_with_a_gap_between():
    """Five images of 2 x 3 in rows of three: 2 * 3 + 1 by 3 * 4 + 1 pixels, -1 black and 1 white like the gaps."""
    ax = plotting.image_grid(IMAGES, columns=3, title="five")
    shown = ax.get_images()[0].get_array()
    assert shown.shape == (7, 13)
    for k, grey in enumerate([0.0, 0.25, 0.5, 0.75, 1.0]):
        top, left = k // 3 * 3 + 1, k % 3 * 4 + 1
        np.testing.assert_allclose(shown[top : top + 2, left : left + 3], grey, atol=1e-6)
    assert (shown[::3] == 1).all()
    assert (shown[:, ::4] == 1).all()
    assert (ax.get_title(), ax.axison) == ("five", False)
    colour = torch.tensor([-1.0, 0.0, 3.0]).reshape(1, 3, 1, 1).expand(1, 3, 2, 2)
    shown = plotting.image_grid(colour, columns=1).get_images()[0].get_array()
    assert shown.shape == (4, 4, 3)
    np.testing.assert_allclose(shown[1, 1], [0, 0.5, 1])  # beyond 1 is cut


def test_rows_and_columns_have_their_names():
    ax = plotting.labelled_rows({"ours": IMAGES[:2], "theirs": IMAGES[2:4]}, columns=["a", "b"], title="two")
    np.testing.assert_allclose(ax.get_images()[0].get_array()[1::3, 1::4], [[0, 0.25], [0.5, 0.75]], atol=1e-6)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["ours", "theirs"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["a", "b"]
    assert ax.get_yticks().tolist() == [1.5, 4.5]  # the rows' middles
    grid = plotting.class_grid(IMAGES[:4], ["cat", "dog"])
    assert grid.get_images()[0].get_array().shape == (7, 9)
    assert [label.get_text() for label in grid.get_xticklabels()] == ["cat", "dog"]


def test_looks_differ_and_go_into_curves():
    looks = plotting.looks([str(i) for i in range(10)])
    assert len({(str(look["color"]), look["marker"]) for look in looks.values()}) == 10
    ax = plotting.curves(LINES, styles=plotting.looks(list(LINES)))
    assert [line.get_marker() for line in ax.lines] == ["o", "s"]


def test_paths_are_drawn_in_standard_deviations_and_coloured_by_their_end():
    target, sigmas = mixture_1d(), torch.tensor([10.0, 1.0, 0.1], dtype=torch.float64)
    path = torch.tensor([[[-20.0], [20.0]], [[-1.0], [1.0]], [[-1.0], [1.2]]], dtype=torch.float64)
    low, high = plotting.paths(target, sigmas, path).lines
    width = (target.sigma_data**2 + 100) ** 0.5
    assert high.get_ydata()[0] == pytest.approx(20 / width)
    assert [to_rgb(line.get_color()) for line in (low, high)] == [to_rgb(plotting.PALETTE[i]) for i in (0, 1)]


def test_arrows_to_scale_end_where_they_point():
    arrows = plotting.field(torch.ones(2, 2), torch.zeros(2, 2), to_scale=True).collections[0]
    assert (arrows.scale, arrows.scale_units, arrows.angles) == (1, "xy", "xy")


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda: plotting.scatter(torch.zeros(4, 3)), ValueError, r"samples has shape \(4, 3\); wanted \(n, 2\)"),
    (lambda: plotting.scatter(torch.zeros(0, 2)), ValueError, "samples has 0 samples"),
    (lambda: plotting.scatter(SAMPLES / 0), ValueError, "samples holds a NaN or infinite"),
    (lambda: plotting.scatter(SAMPLES.tolist()), TypeError, "samples is list"),  # type: ignore[arg-type]
    (lambda: plotting.image_grid(torch.zeros(2, 2, 4, 4)), ValueError, r"wanted \(n, 1 or 3, h, w\)"),
    (lambda: plotting.image_grid(torch.zeros(2, 16)), ValueError, r"images has shape \(2, 16\)"),
    (lambda: plotting.image_grid(torch.zeros(2, 1, 4, 4, dtype=torch.uint8)), TypeError, "images is a tensor of"),
    (lambda: plotting.density(mixture_1d()), ValueError, r"x has shape .*; wanted \(n, 1\)"),
])
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_arrows_lie_on_a_lattice():
    ax = plotting.arrows(lambda x: -x, limit=2.0, n=5)
    quiver = ax.collections[0]
    assert len(quiver.get_offsets()) == 25
    assert np.allclose(np.stack([quiver.U, quiver.V], 1), -quiver.get_offsets())
    logarithmic = plotting.arrows(lambda x: 100 * x, limit=2.0, n=5, log=True).collections[0]
    assert np.hypot(logarithmic.U, logarithmic.V).max() == pytest.approx(np.log1p(100 * np.hypot(2, 2)), rel=1e-5)


def test_sets_stand_side_by_side():
    samples = {"teacher, 35 calls": torch.zeros(5, 2), "student": torch.ones(2000, 2)}
    axes = plotting.side_by_side(samples, target=ring(), n=100)
    assert [ax.get_title() for ax in axes] == list(samples)
    assert len(axes[1].collections[0].get_offsets()) == 100
    colors = [tuple(ax.collections[0].get_facecolor()[0][:3]) for ax in axes]
    assert colors == [tuple(plotting.TEACHER), tuple(plotting.STUDENT)]


def test_shares_of_modes():
    target = ring(4, weights=[1, 1, 2, 4])
    samples = {"exact": target.means, "one mode": target.means[:1]}
    ax = plotting.shares(target, samples)
    heights = np.reshape([bar.get_height() for bar in ax.patches], (2, 4))
    assert np.allclose(heights, [[0.25] * 4, [1, 0, 0, 0]])
    assert np.allclose(ax.collections[0].get_offsets()[:, 1], target.weights)


@pytest.mark.parametrize(("low", "high"), [(0.19, 0.8), (0.05, 6.0), (0.38, 1.5), (1.0, 1.3)])
def test_a_logarithmic_axis_has_at_least_three_numbers(low, high):
    axis = plotting.curves({"a": ([1, 2], [low, high])}).yaxis
    bottom, top = axis.get_view_interval()
    ticks = [*axis.get_majorticklocs(), *axis.get_minorticklocs()]
    assert len([tick for tick in ticks if bottom <= tick <= top]) >= 3


def test_the_palette_is_seaborns():
    import seaborn

    assert [tuple(colour) for colour in seaborn.color_palette("colorblind")] == plotting.PALETTE
