"""Figures: every function draws on the axes it is given (or new ones) and returns them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from torch import Tensor

from minidistill import _validate
from minidistill.distillation.diagnosis import Diagnosis
from minidistill.distributions import GaussianMixture
from minidistill.metrics import mode_coverage
from minidistill.training import checkpoints

__all__ = [
    "PALETTE", "STUDENT", "TEACHER", "arrows", "class_grid", "curves", "density", "dots", "field", "image_grid",
    "label_log", "labelled_rows", "looks", "panel", "paths", "save", "scatter", "shares", "side_by_side",
    "use_theme",
]

#: Seaborn's colour-blind-safe palette; the same colour means the same thing in every figure.
PALETTE = [to_rgb(f"#{colour}") for colour in (
    "0173b2", "de8f05", "029e73", "d55e00", "cc78bc", "ca9161", "fbafe4", "949494", "ece133", "56b4e9",
)]
TEACHER, STUDENT = PALETTE[7], PALETTE[0]


def use_theme() -> None:
    """Seaborn's white-grid theme with type that stays readable when the figure is shrunk."""
    import seaborn as sns  # here, since it takes longer to import than all else that a picture needs

    sns.set_theme(context="notebook", style="whitegrid", palette="colorblind", font_scale=1.0)


def _drawn(x: Tensor) -> np.ndarray:
    """What matplotlib takes: half precision it does not know."""
    return _validate.precise(x.detach().cpu())[0].numpy()


def _axes(ax: Axes | None, size: tuple[float, float] = (4.5, 4.5)) -> Axes:
    return ax if ax is not None else plt.subplots(figsize=size, layout="constrained")[1]


def density(
    target: GaussianMixture, ax: Axes | None = None, *, sigma: float = 0.0, limit: float | None = None,
    fill: bool = False,
) -> Axes:
    """Contours of a 2-D mixture's density at noise level `sigma`, evenly spaced in log-density over 6 nats."""
    ax = _axes(ax)
    limit = _limit(target) if limit is None else limit
    line = torch.linspace(-limit, limit, 161, dtype=target.means.dtype)
    log_p = target.noised(sigma).log_prob(torch.cartesian_prod(line, line)).reshape(161, 161).T
    levels = float(log_p.max()) - np.linspace(6, 0.5, 5)
    if fill:
        ax.contourf(line, line, log_p, levels=[*levels, float(log_p.max())], cmap="Greys", alpha=0.7)
    else:
        ax.contour(line, line, log_p, levels=levels, colors=[TEACHER], linewidths=0.9, alpha=0.9, linestyles="solid")
    return _square(ax, limit)


def scatter(
    samples: Tensor, ax: Axes | None = None, *, target: GaussianMixture | None = None, limit: float | None = None,
    title: str = "", color: object = STUDENT, n: int = 3000,
) -> Axes:
    """The first `n` 2-D samples (n, 2) as points, over the target's contours if there is one."""
    _validate.samples("samples", samples, (2,))
    ax = _axes(ax)
    x = _drawn(samples)[: _validate.whole("n", n)]
    if limit is None:
        limit = _limit(target) if target is not None else 1.1 * float(np.abs(x).max(initial=0.0)) or 1.0
    ax.scatter(x[:, 0], x[:, 1], s=3, alpha=0.35, color=color, linewidths=0, rasterized=True)
    if target is not None:
        density(target, ax, limit=limit)
    ax.set_title(title)
    return _square(ax, limit)


def field(
    vectors: Tensor, points: Tensor, ax: Axes | None = None, *, color: object = PALETTE[3], title: str = "",
    to_scale: bool = False,
) -> Axes:
    """Arrows: vectors (n, 2) at points (n, 2); `to_scale`, each ends at point + vector, on the axes' own scale."""
    ax = _axes(ax)
    _validate.samples("points", points, (2,))
    _validate.samples("vectors", vectors, (2,))
    if len(points) != len(vectors):
        raise ValueError(f"vectors has {len(vectors)} rows and points {len(points)}; wanted as many")
    p, v = _drawn(points), _drawn(vectors)
    scale: dict[str, Any] = {"angles": "xy", "scale_units": "xy", "scale": 1} if to_scale else {}
    ax.quiver(p[:, 0], p[:, 1], v[:, 0], v[:, 1], color=color, width=0.004, **scale)
    ax.set_title(title)
    return _square(ax, 1.05 * float(np.abs(p).max(initial=0.0)) or 1.0)


def arrows(
    function: Callable[[Tensor], Tensor], ax: Axes | None = None, *, limit: float, n: int = 15, log: bool = False,
    color: object = PALETTE[3], title: str = "", dtype: torch.dtype | None = None,
) -> Axes:
    """A vector field, (m, 2) -> (m, 2), as arrows on a lattice of n by n points within +-limit. Their lengths are to
    scale, or with `log` in proportion to ln(1 + length), where long ones would hide the rest."""
    line = torch.linspace(-limit, limit, _validate.whole("n", n, least=2), dtype=dtype)
    points = torch.cartesian_prod(line, line)
    with torch.no_grad():
        vectors = function(points)
    if log:
        length = vectors.norm(dim=1, keepdim=True)
        vectors = vectors / length.clamp(min=1e-12) * length.log1p()
    return field(vectors, points, ax, color=color, title=title)


def side_by_side(
    samples: Mapping[str, Tensor], *, target: GaussianMixture | None = None, limit: float | None = None, n: int = 1000
) -> list[Axes]:
    """A row of scatter plots, each under its name, over the target's contours; a name that starts with "teacher" is
    drawn in the teacher's colour."""
    count = len(samples)
    _, axes = plt.subplots(1, count, figsize=(3.8 * count, 4), layout="constrained", squeeze=False)
    for ax, (name, drawn) in zip(axes[0], samples.items(), strict=True):
        color = TEACHER if name.startswith("teacher") else STUDENT
        scatter(drawn, ax, target=target, limit=limit, title=name, color=color, n=n)
    for ax in axes[0][1:]:
        ax.set_ylabel("")
    return list(axes[0])


def shares(target: GaussianMixture, samples: Mapping[str, Tensor], ax: Axes | None = None) -> Axes:
    """What share of the samples is nearest to each of the target's modes: a bar for each set, and the true weights."""
    ax = _axes(ax, (7, 4))
    modes, width = np.arange(target.n_components), 0.8 / max(1, len(samples))
    for i, (name, drawn) in enumerate(samples.items()):
        color = TEACHER if name.startswith("teacher") else PALETTE[i % len(PALETTE)]
        at = modes + width * (i - (len(samples) - 1) / 2)
        ax.bar(at, _drawn(mode_coverage(target, drawn).shares), 0.93 * width, label=name, color=color)
    ax.scatter(modes, _drawn(target.weights), s=220, marker="_", color="black", label="true weight", zorder=3)
    ax.set(xlabel="mode", ylabel="share of samples", xticks=modes)
    ax.set_ylim(0, 1.55 * ax.get_ylim()[1])
    ax.legend(ncols=2, fontsize=9, loc="upper center")
    return ax


def curves(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]], ax: Axes | None = None, *, xlabel: str = "step",
    ylabel: str = "KL(p || q), nats", log: bool = True, xlog: bool = False, goal: float | None = None,
    styles: Mapping[str, Mapping[str, Any]] | None = None,
) -> Axes:
    """Named lines (x values, y values), each with its own colour and dash pattern, logarithmic in y (and in x: `xlog`).

    `styles` holds matplotlib's line properties by name, where a name must look the same in several figures.
    """
    ax = _axes(ax, (5.5, 4))
    colors = [*PALETTE, to_rgb("black")]
    for index, (name, (x, y)) in enumerate(series.items()):
        look: dict[str, Any] = {"color": colors[index % len(colors)], "linestyle": ("-", "--", "-.", ":")[index % 4],
                                "linewidth": 2}
        ax.plot(x, y, label=name, **look | dict((styles or {}).get(name, {})))
    if goal is not None:
        ax.axhline(goal, color="black", linewidth=1, linestyle=":", label=f"{goal:g}")
    if log:
        ax.set_yscale("log")
        label_log(ax.yaxis)
    if xlog:
        ax.set_xscale("log")
        label_log(ax.xaxis)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.legend()
    return ax


def dots(
    groups: Mapping[str, Sequence[float]], ax: Axes | None = None, *, xlabel: str = "KL(p || q), nats",
    log: bool = True, most: float | None = None, color: object = STUDENT, filled: bool = True, title: str = "",
) -> Axes:
    """A row for each name, from the top: a point for every run and a bar at their median, if that is finite. Runs above
    `most` (or not finite) are crosses at the right edge and count as infinite. Called again on the same axes with the
    same names, it adds to the rows."""
    ax = _axes(ax, (5.5, 0.6 + 0.35 * len(groups)))
    for row, values in enumerate(groups.values()):
        x = np.asarray(values, dtype=float)
        lost = ~np.isfinite(x) if most is None else ~(x <= most)
        y = row + np.linspace(-0.18, 0.18, len(x)) if len(x) > 1 else np.full(len(x), float(row))
        face = {"color": color} if filled else {"facecolors": "none", "edgecolors": [color]}
        ax.scatter(x[~lost], y[~lost], s=26, linewidths=1.2, zorder=3, **face)
        if 2 * lost.sum() < len(x):
            median = np.median(np.where(lost, np.inf, x))
            ax.plot([median] * 2, [row - 0.34, row + 0.34], color=color, linewidth=2, zorder=2)
        ax.scatter(np.ones(lost.sum()), y[lost], marker="x", s=40, color=[color], clip_on=False, zorder=4,
                   transform=ax.get_yaxis_transform())
    ax.set_yticks(range(len(groups)), list(groups))
    ax.set_ylim(len(groups) - 0.5, -0.5)
    if log and any(len(values) for values in groups.values()):
        ax.set_xscale("log")
        label_log(ax.xaxis)
    ax.set(xlabel=xlabel, title=title)
    return ax


def label_log(axis: Axis) -> None:
    """Plain numbers at 1, 2 and 5 on a logarithmic axis of few decades, at 3 and 7 too within one decade, and at a few
    even steps on a very short one."""
    low, high = axis.get_view_interval()
    if high < 300 * low:
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(LogLocator(subs=(2, 5) if high > 10 * low else (2, 3, 5, 7)))
        axis.set_minor_formatter("{x:g}")
    if high < 4 * low:  # too short for those: evenly spaced numbers
        axis.set_major_locator(MaxNLocator(4))
        axis.set_minor_locator(NullLocator())


def image_grid(images: Tensor, ax: Axes | None = None, *, columns: int = 10, title: str = "") -> Axes:
    """Images (n, c, h, w) in [-1, 1], c = 1 or 3, row by row with a thin gap."""
    _validate.samples("images", images)
    columns = _validate.whole("columns", columns)
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images has shape {tuple(images.shape)}; wanted (n, 1 or 3, h, w)")
    ax = _axes(ax)
    n, c, h, w = images.shape
    rows = math.ceil(n / columns)
    canvas = torch.ones(c, rows * (h + 1) + 1, columns * (w + 1) + 1)
    for index, image in enumerate(((images.detach().cpu() + 1) / 2).clamp(0, 1)):
        top, left = index // columns * (h + 1) + 1, index % columns * (w + 1) + 1
        canvas[:, top : top + h, left : left + w] = image
    ax.imshow(canvas.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    ax.set_axis_off()
    ax.set_title(title)
    return ax


def class_grid(
    images: Tensor, names: Sequence[object], ax: Axes | None = None, *, title: str = ""
) -> Axes:
    """Images (n, c, h, w) in [-1, 1] of as many classes as there are names, in turn: a column for each class, under its
    name."""
    rows = {str(k): images[k : k + len(names)] for k in range(0, len(images), len(names))}
    return labelled_rows(rows, ax, labels=[""] * len(rows), columns=names, title=title)


def labelled_rows(
    rows: Mapping[Any, Tensor], ax: Axes | None = None, *, labels: Sequence[str] | None = None,
    columns: Sequence[object] = (), xlabel: str = "", title: str = "",
) -> Axes:
    """Rows of equally many images (n, c, h, w) in [-1, 1], each with its name (or `labels`) at the left; `columns` are
    written above them."""
    n, _, height, width = next(iter(rows.values())).shape
    size = (max(4.0, 0.68 * n) + 0.9, 0.66 * len(rows) * height / width + 0.8)
    ax = image_grid(torch.cat([part.cpu() for part in rows.values()]), _axes(ax, size), columns=n)
    ax.set_axis_on()
    ax.grid(False)
    names = [str(name) for name in (rows if labels is None else labels)]
    ax.set_yticks([(k + 0.5) * (height + 1) for k in range(len(names))], names, fontsize=10)
    ax.set_xticks([(k + 0.5) * (width + 1) for k in range(len(columns))], [str(name) for name in columns], fontsize=9)
    ax.xaxis.tick_top()
    ax.tick_params(length=0, pad=2)
    ax.set(xlabel=xlabel, title=title)
    for spine in ax.spines.values():
        spine.set_visible(False)
    return ax


def panel(seen: Diagnosis, ax: Axes | None = None, *, columns: int = 12) -> Axes:
    """The state of an image distillation at a glance. Rows: student samples, the same noised (each image scaled back to
    its range), the teacher's and, where there is one, the fake network's denoised. Columns: noise levels, rising from
    left to right."""
    columns = _validate.whole("columns", columns)
    ax = _axes(ax, (0.85 * columns, 3.6))
    pick = torch.linspace(0, len(seen.x0) - 1, columns).round().long()
    noised = seen.xt / (1 + seen.sigma.reshape(-1, 1, 1, 1).square()).sqrt()
    rows = {"student": seen.x0, "noised": noised, "teacher's\ndenoised": seen.teacher_x0}
    if seen.fake_x0 is not None:
        rows["fake's\ndenoised"] = seen.fake_x0
    images = torch.cat([x[pick].cpu() for x in rows.values()])
    image_grid(images, ax, columns=columns)
    height, width = images.shape[2] + 1, images.shape[3] + 1
    ax.set_axis_on()
    ax.grid(False)
    ax.set_yticks([(k + 0.5) * height for k in range(len(rows))], list(rows))
    ax.set_xticks([(k + 0.5) * width for k in range(columns)], [f"{s:.2g}" for s in seen.sigma[pick].tolist()])
    ax.set(xlabel=r"noise level $\sigma$")
    if seen.score_gap is not None:
        ax.set_title(f"score gap {seen.score_gap:.3f} (root mean square, in standard deviations of the data)")
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    return ax


def looks(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A colour and a marker for each name, for `styles` in `curves`: lines that look the same in several figures."""
    markers = "os^DvPX<>h"
    return {name: {"color": PALETTE[i % len(PALETTE)], "marker": markers[i % len(markers)], "linestyle": "-",
                   "linewidth": 1.6, "markersize": 6} for i, name in enumerate(names)}


def paths(
    target: GaussianMixture, sigmas: Tensor, path: Tensor, ax: Axes | None = None, *, title: str = ""
) -> Axes:
    """Paths (m, n, 1) of n points on the line at the levels (m,) > 0, over the density of the target at each level. The
    height is in standard deviations of that law, so that noise and data fit into one picture; a path has the colour of
    the mode that is nearest to its end."""
    ax = _axes(ax, (5.5, 3.8))
    heights, width = torch.linspace(-2.6, 2.6, 80).to(path), (target.sigma_data**2 + sigmas.square()).sqrt()
    shade = [w * target.noised(float(s)).log_prob(w * heights[:, None]).exp()
             for s, w in zip(sigmas, width, strict=True)]
    ax.contourf(_drawn(sigmas), _drawn(heights), _drawn(torch.stack(shade, 1)), levels=12, cmap="Greys", vmax=0.9)
    modes = torch.cdist(path[-1], target.means.to(path)).argmin(1)
    for line, mode in zip(_drawn((path[:, :, 0] / width[:, None]).T), modes.tolist(), strict=True):
        ax.plot(_drawn(sigmas), line, color=PALETTE[mode % len(PALETTE)], linewidth=1.4)
    ax.set(xscale="log", xlim=(float(sigmas[0]), float(sigmas[-1])), ylim=(-2.6, 2.6), title=title,
           xlabel="noise level $\\sigma$ (data on the right)", ylabel="$x$ / standard deviation of $p_\\sigma$")
    return ax


def save(figure: Figure, path: str | Path, dpi: int = 110) -> Path:
    """Write the figure atomically, with nothing in it that changes from run to run, close it, and return its path: a
    PNG, or what the name ends in (".svg", ".pdf", ...). ValueError for an ending that matplotlib does not know."""
    path = _validate.path("path", path)
    path = path if path.suffix else path.with_name(path.name + ".png")
    kind = path.suffix[1:].lower()
    known = figure.canvas.get_supported_filetypes()
    if kind not in known:
        raise ValueError(f"path={str(path)!r}: wanted a name that ends in one of {', '.join(sorted(known))}")
    changing = {"png": "Software", "svg": "Date", "pdf": "CreationDate"}
    fixed = {changing[kind]: None} if kind in changing else None
    with checkpoints.atomic(path) as name, open(name, "wb") as file, plt.rc_context({"svg.hashsalt": "minidistill"}):
        figure.savefig(file, format=kind, dpi=dpi, bbox_inches="tight", metadata=fixed)
    plt.close(figure)
    return path


def _limit(target: GaussianMixture) -> float:
    reach = 4 * target.variances.max().sqrt()
    return float(target.means.abs().max() + reach)


def _square(ax: Axes, limit: float) -> Axes:
    ax.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xlabel="$x_1$", ylabel="$x_2$")
    return ax
