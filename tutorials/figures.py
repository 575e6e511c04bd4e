"""Figures that one notebook alone draws: what dresses them, so that cells keep what is the lesson.

What several notebooks draw is in `minidistill.plotting`. A notebook takes this file with

    try:
        import figures
    except ImportError:  # this notebook was copied alone: the package brings the same file
        from minidistill import tutorial_figures as figures
"""

import re

import matplotlib.pyplot as plt
import numpy as np
import seaborn
import torch
from matplotlib.colors import LogNorm

from minidistill import divergences, plotting

__all__ = [
    "FAMILY",
    "_student",
    "averaged_levels",
    "bands",
    "by_size",
    "classifier_errors",
    "couplings",
    "descents",
    "draw_minima",
    "error_bars",
    "exact_and_learned",
    "gaussians",
    "guided_clouds",
    "half_moons",
    "jump_maps",
    "landscape",
    "landscape_bar",
    "log_density_maps",
    "looks_of_losses",
    "losses_by_kind",
    "minima_along",
    "networks_of_halves",
    "nice",
    "one_legend",
    "panels",
    "quality_and_calls",
    "quality_and_time",
    "ratio_tracks",
    "requests_by_class",
    "shrinkage",
    "six_teachers",
    "walks_and_jumps",
    "way_fields",
    "weight_and_pull",
    "weight_bar",
    "what_each_sees",
    "where_it_comes_from",
    "widths_by_level",
    "zoo",
]

PROPER = {"kl": "KL", "jensen_shannon": "Jensen-Shannon", "hellinger": "Hellinger",
          "jeffreys": "Jeffreys", "pearson": "Pearson", "neyman": "Neyman", "le_cam": "Le Cam",
          "fisher": "Fisher", "dmd": "DMD", "dmd2": "DMD2", "sim_l2": "SIM, L2", "sim": "SIM",
          "sid": "SiD", "sida": "SiDA", "f_distill": "f-distill", "diff_instruct": "Diff-Instruct",
          "uni_instruct": "Uni-Instruct", "ict": "iCT", "ect": "ECT", "scm": "sCM",
          "ctm": "CTM", "alpha_flow": "α-flow", "alpha": "α =", "mmd": "MMD", "gan": "GAN",
          "sds": "SDS", "asd": "ASD", "sinkhorn": "Sinkhorn", "wasserstein": "Wasserstein",
          "real_uid": "RealUID"}


def nice(name):
    """A name for readers: "reverse_kl" -> "reverse KL"."""
    for short, proper in PROPER.items():
        name = re.sub(rf"(?<![a-z]){short}(?![a-z0-9])", proper, name)
    return name.replace("_", " ")


# ------------------------------------------------- 02b_more_losses

def looks_of_losses(names):
    """A colour and a marker for each loss, the same in every figure; the referee is black."""
    order = (0, 1, 2, 7, 4, 9, 5, 3, 8)
    colors = ["black", *(plotting.PALETTE[i] for i in order)]
    markers = " osvxDPX^*"
    return {
        name: {"color": color, "marker": marker}
        for name, color, marker in zip(names, colors, markers, strict=False)
    }


def losses_by_kind(levels, values, looks, title, ylabel):
    """Two panels of curves over noise levels: the losses of x alone, and those of x0 and noise."""
    names = list(values)
    kinds = {"$x$ alone": names[:6], "$x_0$ and noise": [names[0], *names[6:]]}
    _, axes = plt.subplots(1, 2, figsize=(11, 4.3), layout="constrained", sharey=True)
    for ax, (kind, shown) in zip(axes, kinds.items(), strict=True):
        series = {name: (levels, values[name]) for name in shown}
        label = "noise level $\\sigma$"
        plotting.curves(series, ax, xlabel=label, ylabel=ylabel, xlog=True, styles=looks)
        ax.set_title(f"{title}: losses of {kind}")
        ax.legend(fontsize=9, ncols=2)
    axes[1].set_ylabel("")
    plt.show()


# ------------------------------------------------- 05_teachers, 05b_biased_and_guided

def six_teachers(kinds, few, law, levels):
    """A column for each teacher, a row for each noise level: arrows from a lattice of x to D(x), on
    one scale along a row, over the noised density in grey. Dots: the points that the closed forms
    know."""
    line = torch.linspace(-2.7, 2.7, 7)
    at = torch.cartesian_prod(line, line)
    shape = (len(levels), len(kinds))
    _, axes = plt.subplots(*shape, figsize=(12.5, 6.9), layout="constrained",
                           sharex=True, sharey=True)
    for i, (row, sigma) in enumerate(zip(axes, levels, strict=True)):
        for ax, (name, D) in zip(row, kinds.items(), strict=True):
            plotting.density(law, ax, limit=3.2, sigma=sigma, fill=True)
            ax.collections[0].set_alpha(0.35)
            if name in ("Gaussian", "empirical", "smoothed"):
                ax.scatter(*few.T, s=10, color=plotting.PALETTE[1], linewidths=0, zorder=3)
            arrow = (D(at, sigma) - at).detach()
            ax.quiver(*at.T, *arrow.T, angles="xy", scale_units="xy", scale=max(1, 1.1 * sigma),
                      color=plotting.PALETTE[0], width=0.011, antialiased=False)
            ax.set(title="" if i else name, xlabel="", ylabel="", aspect="equal")
        row[0].set_ylabel(f"$\\sigma = {sigma:g}$")
    plt.show()


def half_moons(samples, train, copies, averages, limit=1.8):
    """Samples of the smoothed teachers of 25 points (circles), by the smoothing h, and what h does
    on average over the data sets: (distance of a fresh point, SW2) by h."""
    _, axes = plt.subplots(1, len(samples) + 1, figsize=(12.5, 3.5), layout="constrained",
                           width_ratios=(*[1] * len(samples), 1.2))
    for ax, (h, y) in zip(axes, samples.items(), strict=False):
        plotting.scatter(y, ax, limit=limit, title=f"$h = {h:g}$: {copies[h]:.0%} copies")
        ax.scatter(*train.T, s=40, facecolors="none", edgecolors=plotting.PALETTE[1])
        ax.label_outer()
    near, distance = zip(*averages.values(), strict=True)
    series = {"fresh point to nearest sample": (list(averages), near),
              "$SW_2$ to fresh points": (list(averages), distance)}
    plotting.curves(series, axes[-1], xlabel="smoothing $h$", ylabel="distance", log=False)
    axes[-1].set(ylim=(0, 0.42), title="mean of four data sets")
    axes[-1].legend(fontsize=10)
    plt.show()


def networks_of_halves(drawn, halves, sizes):
    """Samples of the networks A and B from the same noise (columns) between the training images
    nearest to them, for each number of training images."""
    _, axes = plt.subplots(1, len(sizes), figsize=(12.5, 3.6), layout="constrained")
    for ax, n in zip(axes, sizes, strict=True):
        a, b = (samples[:10] for samples in drawn[n])
        nearest = [half[torch.cdist(x.flatten(1), half[:n].flatten(1)).argmin(1)]
                   for x, half in zip((a, b), halves, strict=True)]
        rows = {"nearest in A": nearest[0], "network A": a, "network B": b,
                "nearest in B": nearest[1]}
        plotting.labelled_rows(rows, ax, title=f"$N = {n}$ images each")
    plt.show()


def by_size(sizes, agree, near):
    """Two panels over the number of training images: agreement, and the distance to them."""
    _, axes = plt.subplots(1, 2, figsize=(11.5, 3.6), layout="constrained")
    panels = (("same noise: do A and B agree?", "mean cosine", agree, (0, 1.1)),
              ("to the nearest of the $N$ training images", "mean distance", near, (-0.2, 6)))
    for ax, (title, ylabel, rows, limits) in zip(axes, panels, strict=True):
        series = {name: (sizes, row) for name, row in rows.items()}
        plotting.curves(series, ax, xlabel="training images $N$", ylabel=ylabel, log=False,
                        xlog=True)
        ax.minorticks_off()
        ax.set(xticks=sizes, xticklabels=sizes, title=title, ylim=limits)
        ax.legend(fontsize=10)
    plt.show()


def shrinkage(noised, denoised, factors, vectors, ranks):
    """A row for each network: one noised image, the same denoised, and eigenvectors of the
    Jacobian as images under their shrinkage factors. `vectors` (dim, dim) hold them as columns."""
    _, axes = plt.subplots(len(vectors), len(ranks) + 2, layout="constrained",
                           figsize=(1.15 * (len(ranks) + 2), 1.45 * len(vectors)))
    for i, (row, name) in enumerate(zip(axes, vectors, strict=True)):
        shape = noised.shape[-2:]
        pictures = {"noised": noised, "denoised": denoised[name]}
        for ax, (title, picture) in zip(row, pictures.items(), strict=False):
            ax.imshow(picture.reshape(shape), cmap="gray", vmin=-1, vmax=1)
            ax.set_title("" if i else f"{title}\n", fontsize=11)
        for ax, rank in zip(row[2:], ranks, strict=True):
            vector = vectors[name][:, rank - 1].reshape(shape)
            reach = float(vector.abs().max())
            ax.imshow(vector, cmap="RdBu", vmin=-reach, vmax=reach)
            head = "" if i else f"no. {rank}\n"
            ax.set_title(f"{head}{factors[name][rank - 1]:.2f}", fontsize=11)
        for ax in row:
            ax.set(xticks=[], yticks=[])
        row[0].set_ylabel(name, fontsize=11)
    plt.show()


def guided_clouds(flows, log_p, axis, distances):
    """The guided flow's samples (dots) over the tempered density (contours) by the scale w, and
    distances by name over all scales."""
    _, axes = plt.subplots(1, len(flows) + 1, figsize=(14.5, 3.6), layout="constrained",
                           width_ratios=(*[1] * len(flows), 1.1))
    for ax, (w, samples) in zip(axes, flows.items(), strict=False):
        plotting.scatter(samples, ax, n=1500, title=f"$w = {w:g}$")
        levels = float(log_p[w].max()) + torch.linspace(-5, -0.5, 4)
        ax.contour(axis, axis, log_p[w].reshape(len(axis), -1).T, levels=levels, colors="black",
                   linewidths=1, linestyles="solid")
        ax.set(xlim=(-1.4, 3.8), ylim=(-2.6, 2.6))
        ax.label_outer()
    plotting.curves(distances, axes[-1], xlabel="guidance scale $w$", ylabel="$SW_2$", log=False)
    axes[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=10)
    plt.show()


def log_density_maps(maps, axis, heights):
    """Log-densities on a square lattice, and the energy's heights of the modes against the exact
    ones, (exact, said) by noise level."""
    figure, axes = plt.subplots(1, len(maps) + 1, figsize=(13.4, 3.6), layout="constrained",
                                width_ratios=(*[1] * len(maps), 1.05))
    for ax, (name, values) in zip(axes, maps.items(), strict=False):
        image = ax.pcolormesh(axis, axis, values.reshape(len(axis), -1).T, cmap="viridis",
                              vmin=-8, vmax=0, rasterized=True)
        ax.set(title=name, aspect="equal", xlabel="$x_1$", ylabel="$x_2$")
    for ax in axes[1 : len(maps)]:
        ax.set_ylabel("")
    figure.colorbar(image, ax=axes[: len(maps)], label="$\\log p_{0.2}$, nats", shrink=0.8,
                    extend="min")
    for (sigma, pair), marker, color in zip(heights.items(), "xso", (3, 1, 0), strict=True):
        axes[-1].scatter(*pair, marker=marker, s=45, color=plotting.PALETTE[color],
                         label=f"$\\sigma = {sigma:g}$")
    axes[-1].axline((0, 0), slope=1, color="black", linewidth=1)
    axes[-1].set(title="heights of the modes", xlabel="exact, nats above their mean",
                 ylabel="$-E$, nats above its mean")
    axes[-1].legend(fontsize=10)
    plt.show()


# ------------------------------------------------- 09_distribution_matching

def weight_and_pull(name, teacher, student, sigma, samples, ax, limit=3.6):
    """A divergence's weight h as colour (1: its mean over the samples), and h (D_p - D_q) as
    arrows, cut where they are long; the circle is two standard deviations of the student."""
    def weight(x):
        log_ratio = teacher.noised(sigma).log_prob(x) - student.noised(sigma).log_prob(x)
        return divergences.F[name].log_weight(log_ratio).exp()

    average = weight(samples).mean()
    line, fine = torch.linspace(-3.2, 3.2, 9), torch.linspace(-limit, limit, 91)
    points = torch.cartesian_prod(line, line)
    pull = (weight(points) / average)[:, None] * (teacher(points, sigma) - student(points, sigma))
    pull = pull * (0.55 / pull.norm(dim=1, keepdim=True)).clamp(max=1)
    share = (weight(torch.cartesian_prod(fine, fine)) / average).log10().clamp(-1.499, 1.499)
    filled = ax.contourf(fine, fine, share.reshape(91, 91).T, levels=np.linspace(-1.5, 1.5, 13),
                         cmap="PuOr_r", antialiased=False)
    ax.quiver(*points.T, *pull.T, angles="xy", scale_units="xy", scale=1, width=0.009,
              antialiased=False)
    radius = 2 * (student.sigma_data**2 + sigma**2) ** 0.5
    circle = plt.Circle(student.means[0], radius, fill=False, color="black", linestyle="--")
    ax.add_patch(circle)
    ax.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", title=nice(name))
    ax.set(xlabel="$x_1$", ylabel="$x_2$")
    ax.label_outer()
    return filled


def weight_bar(filled, axes):
    """The colours of `weight_and_pull`, once for all panels."""
    label = "weight $h$ (1: mean over the student's samples)"
    bar = axes.flat[0].figure.colorbar(filled, ax=axes, shrink=0.8, label=label, ticks=[-1, 0, 1])
    bar.ax.set_yticklabels(["0.1", "1", "10"])


def gaussians(fits, mixture, axes):
    """Students of one Gaussian, a panel for each objective and a line for each seed, over the
    mixture's density in grey. `fits` holds (mean, standard deviation) of each seed by name."""
    x = torch.linspace(-5, 5, 301)
    for ax, (name, found) in zip(axes.flat, fits.items(), strict=False):
        ax.fill_between(x, mixture.log_prob(x[:, None]).exp(), color="0.8", linewidth=0)
        for mean, std in found:
            density = torch.distributions.Normal(mean, std).log_prob(x).exp()
            ax.plot(x, density, color=plotting.STUDENT, linewidth=2)
        middle = sorted(std for _, std in found)[len(found) // 2]
        ax.set(title=f"{name}\nstd {middle:.2f}", xlabel="$x$", ylabel="density", ylim=(0, 0.9))
        ax.label_outer()


def exact_and_learned(exact, learned, ax):
    """Learned against exact log ratios, a dot a sample; on the line they are equal."""
    ax.plot([-8, 4], [-8, 4], color="black", linewidth=1)
    ax.scatter(exact, learned, s=4, alpha=0.4, color=plotting.STUDENT, linewidths=0)
    ax.set(xlim=(-8, 3), ylim=(-8, 3), xlabel="exact $\\ln r$", ylabel="learned $\\ln r$")


def ratio_tracks(seen, ax):
    """Error and size of the log ratio while a student is trained, (step, error, size) by level."""
    for (level, track), color in zip(seen.items(), (plotting.PALETTE[0], plotting.PALETTE[3]),
                                     strict=True):
        steps, error, size = zip(*track, strict=True)
        ax.plot(steps, error, color=color, linewidth=2, label=f"error, $\\sigma = {level}$")
        ax.plot(steps, size, ":", color=color, linewidth=2, label=f"size, $\\sigma = {level}$")
    ax.set(yscale="log", xlabel="step", ylabel="$\\ln r$, root mean square")
    ax.set(title="while a student is trained")
    ax.legend(fontsize=10)


def panels(figures, shape, size):
    """A figure of dot plots, one for each (title, what is on its axis, logarithmic?, groups)."""
    figure, axes = plt.subplots(*shape, figsize=size, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.1)
    for ax, (title, xlabel, log, groups) in zip(axes.flat, figures, strict=True):
        plotting.dots(groups, ax, xlabel=xlabel, log=log, most=20, title=title)
    return axes


# ------------------------------------------------- 08_from_divergence_to_gradient

def descents(paths, mixture, axes):
    """Paths of (mean, standard deviation), (steps, 2), from their starts (rings) to their ends
    (stars), and the students at the end over the mixture's density in grey."""
    x = torch.linspace(-5, 5, 301)
    axes[1].fill_between(x, mixture.log_prob(x[:, None]).exp(), color="0.8", linewidth=0)
    looks = zip(paths, plotting.PALETTE, ("-", "--", "-.", ":"), strict=False)
    for path, color, dash in looks:
        start = "start {:g}, {:g}".format(*path[0].tolist())
        axes[0].plot(*path.T, dash, color=color, linewidth=2, label=start)
        axes[0].plot(*path[0], "o", markersize=7, markerfacecolor="white", color=color)
        axes[0].plot(*path[-1], "*", markersize=14, color=color)
        end = torch.distributions.Normal(*path[-1]).log_prob(x).exp()
        axes[1].plot(x, end, dash, color=color, linewidth=2, label=start)
    axes[0].set(xlabel="$\\mu$", ylabel="$s$", xlim=(-3.5, 5), title="descent on reverse KL")
    axes[0].legend(fontsize=10)
    axes[1].set(xlabel="$x$", ylabel="density", title="where the students end")


def where_it_comes_from(row, teacher, student, ax, limit=4.2):
    """Directions of h (s_p - s_q) in the plane, and in orange where q h |s_p - s_q| is above 15
    and 50 % of its maximum. Circles are two standard deviations."""
    def move(x):
        log_ratio = teacher.log_prob(x) - student.log_prob(x)
        return row.direction(teacher.score(x), student.score(x), log_ratio)

    line, fine = torch.linspace(-3.6, 3.6, 9), torch.linspace(-limit, limit, 121)
    points, all_over = torch.cartesian_prod(line, line), torch.cartesian_prod(fine, fine)
    share = student.log_prob(all_over).exp() * move(all_over).norm(dim=1)
    share = (share / share.max()).reshape(121, 121).T
    ax.contourf(fine, fine, share, levels=[0.15, 0.5, 1], colors=["#fde3c8", "#f9b57c"],
                antialiased=False)
    arrows = torch.nn.functional.normalize(teacher.score(points) - student.score(points))
    ax.quiver(*points.T, *arrows.T, color="0.35", scale=13, width=0.008,
              antialiased=False)
    for law, dash, color in ((teacher, "-", "black"), (student, "--", plotting.STUDENT)):
        for mean, variances in zip(law.means, law.variances, strict=True):
            radius = 2 * variances[0].sqrt()
            ax.add_patch(plt.Circle(mean, radius, fill=False, linestyle=dash, linewidth=1.8,
                                    color=color))
    ax.set(aspect="equal", xlim=(-limit, limit), ylim=(-limit, limit), xlabel="$x_1$")
    ax.label_outer()


def _student(ax, mixture, mean, std, **look):
    """A Gaussian over the mixture in grey: orange on one mode, blue across both."""
    x = torch.linspace(-5, 5, 201)
    ax.grid(False)
    ax.fill_between(x, mixture.log_prob(x[:, None]).exp(), color="0.82", linewidth=0, zorder=1)
    color = plotting.PALETTE[3] if std < 1.2 else plotting.STUDENT
    density = torch.distributions.Normal(mean, std).log_prob(x).exp()
    ax.plot(x, density, **({"color": color} | look))


def draw_minima(best, mixture, axes):
    """The minima (value, mean, std) of each objective, a panel each in the order of the lowest's
    std; the lowest is thick."""
    names = sorted(best, key=lambda name: best[name][0][2])
    for ax, name in zip(axes.flat, names, strict=True):
        for place, (_, mean, std) in enumerate(best[name]):
            _student(ax, mixture, mean, std, linewidth=1.2 if place else 3)
        _, mean, std = best[name][0]
        ax.set_title(f"{name}\n$\\mu = {mean:.2f}$, $s = {std:.2f}$", fontsize=11)
        ax.set(xlabel="$x$", ylabel="density", xlim=(-5, 5))
        ax.label_outer()


def widths_by_level(at_level, ax):
    """Widths of the minima against the noise level: lines for the lowest, rings for others."""
    looks = zip(at_level.items(), ("-", "--", ":"), plotting.PALETTE[3::-1], strict=False)
    for (name, track), dash, color in looks:
        levels = [level for level, _ in track]
        ax.plot(levels, [found[0][2] for _, found in track], dash, color=color, linewidth=2.4,
                label=name)
        others = [(level, std) for level, found in track for _, _, std in found[1:]]
        if others:
            ax.plot(*zip(*others, strict=True), "o", markerfacecolor="none", color=color)
    ax.set(xscale="log", xticks=(0.1, 0.3, 1, 3), xticklabels=(0.1, 0.3, 1, 3), ylim=(0, 2.6))
    ax.set(xlabel="noise level $\\sigma$", ylabel="student's $s$")
    ax.set(title="one level alone (rings: higher minima)")
    ax.legend(fontsize=10)


def averaged_levels(mixed, mixture, ax):
    """The best students of an average over noise levels, (value, mean, std) by the power k."""
    looks = zip(mixed.items(), ("-", "--", ":"), plotting.PALETTE[3::-1], strict=False)
    for (k, (_, mean, std)), dash, color in looks:
        _student(ax, mixture, mean, std, linestyle=dash, linewidth=2.4, color=color,
                 label=f"$k = {k}$: $s = {std:.2f}$")
    ax.set(xlabel="$x$", ylabel="density")
    ax.set(title="reverse KL, levels weighed by $\\sigma^k$")
    ax.legend(fontsize=10)


def landscape(height, means, stds, minima, ax):
    """A divergence over students, relative to its lowest minimum: yellow is low."""
    doublings = (height / minima[0][0]).log2().clamp(0, 3)
    filled = ax.contourf(means, stds, doublings, levels=np.linspace(0, 3, 13), cmap="viridis_r")
    sizes = [260] + [70] * (len(minima) - 1)
    _, mean, std = zip(*minima, strict=True)
    ax.scatter(mean, std, s=sizes, marker="*", color="white", edgecolor="black", zorder=3)
    ticks = (0.3, 0.6, 1, 2, 4)
    ax.set(yscale="log", yticks=ticks, yticklabels=ticks, xlabel="$\\mu$", ylabel="$s$")
    ax.yaxis.set_minor_formatter("")
    ax.label_outer()
    return filled


def landscape_bar(filled, axes):
    label = "$D$ over its lowest value"
    bar = axes.flat[0].figure.colorbar(filled, ax=axes, shrink=0.8, label=label, ticks=range(4))
    bar.ax.set_yticklabels(["1", "2", "4", "8 and more"])


def minima_along(track, name, ax):
    """Widths of all minima along a family of divergences, (parameter, minima)."""
    others = [(value, std) for value, found in track for _, _, std in found[1:]]
    ax.scatter(*zip(*others, strict=True), s=26, color=plotting.TEACHER, label="other minima")
    lowest = [(value, found[0][2]) for value, found in track]
    ax.scatter(*zip(*lowest, strict=True), s=26, color=plotting.PALETTE[3], label="lowest")
    ax.set(xlabel=name, ylabel="$s$", xlim=(track[0][0], track[-1][0]), ylim=(0, 2.4))
    ax.set_title(f"minima along {name}")
    ax.legend(fontsize=10, loc="center left")


# ------------------------------------------------- 07_divergences

DASHES = ("-", "--", "-.", (0, (5, 1)), ":")


def zoo(table, axes):
    """f without its tangent at 1, f' and h of each divergence in units of f''(1), over r, and the
    two limits: what mass costs that only one of the two laws has."""
    one, r = torch.ones((), dtype=torch.float64), torch.logspace(-3, 3, 241, dtype=torch.float64)
    far = 3.4  # where infinity is drawn
    for i, (name, row) in enumerate(table.items()):
        unit, tilt = row.weight(one), row.df(one)
        look = {"color": plotting.PALETTE[i], "linestyle": DASHES[i % 5], "linewidth": 2.2}
        drawn = (row.f(r) - tilt * (r - 1), row.df(r) - tilt, row.weight(r))
        for ax, y in zip(axes.flat, drawn, strict=False):
            ax.plot(r, y / unit, label=nice(name), **look)
        only_q = min(float((row.at_zero + tilt) / unit), far)
        only_p = min(float((row.at_infinity - tilt) / unit), far)
        axes[1, 1].plot(only_q, only_p, "o", color=look["color"])
        left = only_q == far
        up = {"softened_reverse_kl": 6, "neyman": -16, "reverse_kl": 6}.get(name, -4)
        if only_p == far and not left:
            up = {"pearson": 10, "forward_kl": -16}.get(name, 8)
        axes[1, 1].annotate(nice(name), (only_q, only_p), (-8 if left else 8, up), fontsize=11,
                            textcoords="offset points", ha="right" if left else "left")
    shown = (("$f$, its tangent at 1 taken off", "linear", (-0.1, 4)),
             ("$f'$, made 0 at 1", "linear", (-4, 4)),
             ("$h = r^2 f''$, the weight of the score gap", "log", (1e-3, 1e3)))
    for ax, (title, kind, limits) in zip(axes.flat, shown, strict=False):
        ax.set(xscale="log", yscale=kind, xlabel="$r = p / q$", ylim=limits, title=title)
    ticks, labels = (0, 1, 2, far), ("0", "1", "2", "∞")
    axes[1, 1].set(xlim=(0, 3.7), ylim=(0, 3.8), xticks=ticks, yticks=ticks, title="the two limits",
                   xticklabels=labels, yticklabels=labels,
                   xlabel="cost of mass that only q has", ylabel="cost of mass that only p has")
    handles, names = axes[0, 0].get_legend_handles_labels()
    axes[0, 0].figure.legend(handles, names, loc="outside right center", fontsize=11)


def what_each_sees(seen, teacher, students):
    """A heat map: a row for each divergence, a column for each failure, each row over its largest
    entry; above it the students over the teacher in grey."""
    kinds = [*"abcde"][: len(students)]
    _, axes = plt.subplot_mosaic([kinds, ["map"] * len(kinds)], height_ratios=(1, 5),
                                 figsize=(11, 8.6), layout="constrained")
    x = torch.linspace(-5.5, 5.5, 401, dtype=torch.float64)[:, None]
    for key, (failure, q) in zip(kinds, students.items(), strict=True):
        axes[key].fill_between(x[:, 0], teacher.log_prob(x).exp(), color="0.75", linewidth=0)
        axes[key].plot(x, q.log_prob(x).exp(), color=plotting.STUDENT)
        axes[key].set(xlim=(-5.5, 5.5), yticks=(), xticks=(-3, 0, 3), title=failure)
    names = list(next(iter(seen.values())))
    first = ["Pearson", "forward KL", "Jeffreys", "squared Hellinger", "Jensen-Shannon", "Le Cam",
             "total variation", "softened reverse KL", "reverse KL", "Neyman"]
    names.sort(key=lambda name: first.index(name) if name in first else len(first))
    table = torch.tensor([[column[name] for column in seen.values()] for name in names])
    seaborn.heatmap(table / table.amax(1, keepdim=True), ax=axes["map"], annot=True, fmt=".2f",
                    cmap="Blues", vmin=0, vmax=1, cbar=False, yticklabels=names, xticklabels=False)
    return table


def error_bars(errors, ax):
    """Errors in % with two standard errors, a row for each name."""
    deviations, standard = zip(*errors.values(), strict=True)
    ax.errorbar(deviations, range(len(errors)), xerr=[2 * one for one in standard], fmt="o",
                capsize=3)
    ax.axvline(0, color="black", linewidth=1)
    ax.set(yticks=range(len(errors)), yticklabels=errors, ylim=(len(errors) - 0.5, -0.5),
           xlabel="error, % of the exact value (± 2 s.e.)", title="estimates from scores alone")


# ------------------------------------------------- 07b_from_samples

def classifier_errors(scores, teacher_error):
    """Test and calibration errors in %, (2, true or noisy labels, runs) by name: means with
    standard deviations over the runs."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 6), layout="constrained", sharey=True)
    kinds = (("true labels", 0, "o"), ("every second label drawn at random", 3, "s"))
    titles = ("test error, %", "expected calibration error, %")
    for i, (ax, title) in enumerate(zip(axes, titles, strict=True)):
        for j, (kind, color, marker) in enumerate(kinds):
            means = [float(row[i, j].mean()) for row in scores.values()]
            stds = [float(row[i, j].std()) for row in scores.values()]
            rows = [k + 0.16 * (2 * j - 1) for k in range(len(scores))]
            ax.errorbar(means, rows, xerr=stds, fmt=marker, capsize=2, label=kind,
                        color=plotting.PALETTE[color])
        ticks = (2, 5, 10, 20, 50)
        ax.set(xscale="log", xticks=ticks, xticklabels=ticks, xlim=(1.6, 95), xlabel=title,
               yticks=range(len(scores)), yticklabels=scores, ylim=(len(scores) - 0.5, -0.5))
        ax.minorticks_off()
    axes[0].axvline(teacher_error, color="black", linestyle=":", label="teacher")
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=3, fontsize=11)


# ------------------------------------------------- 11_trajectories

def walks_and_jumps(path, one_call, ends, law):
    """Paths of the probability flow (m, n, 2), at evenly spaced angles from noise to data; where
    one call of the teacher lands from all starts; and straight lines from starts to ends. Points
    are drawn times cos t, so that all laws are of one size."""
    angles = torch.linspace(np.arctan(20.0), 0, len(path), dtype=path.dtype)
    drawn = path * angles.cos()[:, None, None]
    modes = torch.cdist(path[-1], law.means).argmin(1)
    _, axes = plt.subplots(1, 3, figsize=(12.6, 4.4), layout="constrained", sharey=True)
    for walker, mode in zip(drawn.transpose(0, 1), modes, strict=True):
        color = plotting.PALETTE[int(mode)]
        axes[0].plot(*walker.T, color=color, linewidth=1.1)
        axes[2].plot(*walker[[0, -1]].T, color=color, linewidth=1.1)
        for ax in (axes[0], axes[2]):
            ax.plot(*walker[0], "o", markersize=5, markerfacecolor="white", color=color)
            ax.plot(*walker[-1], "o", markersize=4, color=color)
    plotting.scatter(one_call, axes[1], target=law, limit=4.2)
    titles = ("the teacher's walk", "one call of the teacher", "the jump that we want")
    for ax, title in zip(axes, titles, strict=True):
        ax.set(xlim=(-4.2, 4.2), ylim=(-4.2, 4.2), aspect="equal", title=title, xlabel="$x_1$")
        ax.label_outer()
    axes[0].set_ylabel("$x_2$")
    axes[1].set_ylabel("")
    plt.show()


def one_legend(axes):
    """The legend of the first panel, for all of them, at the right of the figure."""
    handles, names = axes[0].get_legend_handles_labels()
    for ax in axes:
        ax.get_legend().remove()
    nicer = [nice(name) for name in names]
    axes[0].figure.legend(handles, nicer, loc="outside right center", fontsize=10)


def couplings(noise, partners, n=60):
    """Lines between noise (rings) and its partners (dots), (m, 2), by kind of coupling."""
    _, axes = plt.subplots(1, len(partners), figsize=(12.6, 4.4), layout="constrained", sharey=True)
    for ax, (title, to) in zip(axes, partners.items(), strict=True):
        for a, b in zip(noise[:n], to[:n], strict=True):
            ax.plot([a[0], b[0]], [a[1], b[1]], color="0.55", linewidth=0.8)
        ax.plot(*noise[:n].T, "o", markersize=5, markerfacecolor="white", color=plotting.TEACHER)
        ax.plot(*to[:n].T, "o", markersize=4, color=plotting.STUDENT)
        ax.set(aspect="equal", xlim=(-2.9, 2.9), ylim=(-2.9, 2.9), title=title, xlabel="$z_1$")
    axes[0].set_ylabel("$z_2$")
    plt.show()


def jump_maps(distances, maps, levels):
    """How far the exact flow map moves points, and the errors of learned ones, (from, to) by
    levels in standard deviations of the data."""
    figure, axes = plt.subplots(2, 4, figsize=(13, 6.4), layout="constrained")
    names = [f"{level:.2g}" for level in levels]
    tables = {"exact: how far it moves": distances}
    tables |= {f"{name}: error": error for name, error in maps.items()}
    looks = [{"cmap": "Greys", "norm": LogNorm(0.1, 20)}]
    looks += [{"cmap": "viridis_r", "norm": LogNorm(0.01, 1)}] * len(maps)
    for ax, (title, table), look in zip(axes.flat, tables.items(), looks, strict=False):
        ax.imshow(np.clip(table, look["norm"].vmin, look["norm"].vmax), **look)
        ax.grid(False)
        ax.set(title=title, xticks=range(len(names)), yticks=range(len(names) - 1))
        ax.set_xticklabels(names, fontsize=9, rotation=60)
        ax.set_yticklabels(names[:-1], fontsize=9)
        ax.set(xlabel="to", ylabel="from")
    for ax in axes.flat[len(tables) :]:
        ax.set_axis_off()
    bars = ((0.62, axes[0, 0], "way / $\\sigma_d$"), (0.2, axes[0, 1], "error / $\\sigma_d$"))
    for place, ax, label in bars:
        inset = axes[1, 3].inset_axes((0.05, place, 0.9, 0.08))
        figure.colorbar(ax.images[0], cax=inset, orientation="horizontal", label=label)
    plt.show()


# ------------------------------------------------- 13_paths_and_forgetting

def way_fields(way, shown, samples, law, sigma):
    """Where denoisers of a way send points at one noise level, arrows from a lattice of x to D(x),
    shortened; the student's samples (n, 2) as dots, the teacher's law as contours."""
    across, up = torch.linspace(-4, 9.5, 14), torch.linspace(-4, 4, 8)
    at = torch.cartesian_prod(across, up)
    _, axes = plt.subplots(2, 2, figsize=(12.5, 7.6), layout="constrained", sharex=True,
                           sharey=True)
    for ax, (title, number) in zip(axes.flat, shown.items(), strict=True):
        with torch.no_grad():
            arrow = way[number](at, torch.full((len(at),), sigma)) - at
        plotting.density(law, ax, limit=4)
        ax.scatter(*samples.T, s=5, color=plotting.STUDENT, linewidths=0, alpha=0.5)
        ax.quiver(*at.T, *(0.3 * arrow).T, angles="xy", scale_units="xy", scale=1, width=0.0035,
                  color=plotting.PALETTE[3])
        ax.set(xlim=(-4.6, 10), ylim=(-4.6, 4.6), aspect="equal", title=title, xlabel="$x_1$",
               ylabel="$x_2$")
        ax.label_outer()
    plt.show()


FAMILIES = {
    "matches distributions": (
        "reverse_kl forward_kl jensen_shannon softened_reverse_kl squared_hellinger jeffreys "
        "pearson neyman le_cam diff_instruct dmd dmd2 f_distill skew_jensen_shannon "
        "score_of_mixture"),
    "matches scores": "sim sim_l2 sid sida fisher uni_instruct real_uid",
    "follows the teacher's path": (
        "regression consistency_distillation consistency_training ict ect scm ctm mean_flow "
        "improved_mean_flow alpha_flow flow_map progressive reflow"),
    "compares samples": ("drifting sinkhorn mmd energy_score embedding_loss moment_matching "
                         "wasserstein_flow"),
    "learns a ratio": "class_ratio gan score_mismatching score_of_mixture_training",
    "nothing beside the student": "sds asd",
}
FAMILY = {name: family for family, names in FAMILIES.items() for name in names.split()}
FAMILY_LOOKS = {
    family: {"color": color, "marker": marker}
    for family, color, marker in zip(
        FAMILIES, (*(plotting.PALETTE[i] for i in (0, 1, 2, 3, 4)), (0.1, 0.1, 0.1)), "osD^vX",
        strict=True)
}


def place_labels(ax, texts, points, fontsize=10):
    """Write texts {text: (x, y)} beside their points, where they hide neither each other nor any
    of `points` (m, 2); a line leads to a label that had to go farther. Axes' limits are final, and
    the layout is not constrained."""
    renderer = ax.figure.canvas.get_renderer()
    frame = ax.get_window_extent(renderer).extents
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in ax.transData.transform(points)]
    line = {"arrowstyle": "-", "color": "0.4", "linewidth": 0.7, "shrinkA": 0, "shrinkB": 3}
    for text, point in sorted(texts.items(), key=lambda item: -item[1][1]):
        probe = ax.annotate(text, point, fontsize=fontsize)
        box = probe.get_window_extent(renderer)
        probe.remove()
        spots = _around(ax.transData.transform(point), box.width, box.height, ax.figure.dpi / 72)
        for far, spot in spots:
            inside = (frame[0] < spot[0] and frame[1] < spot[1]
                      and spot[2] < frame[2] and spot[3] < frame[3])
            if inside and not any(_overlap(spot, other) for other in taken):
                taken.append(spot)
                ax.annotate(text, point, spot[:2], textcoords="figure pixels", fontsize=fontsize,
                            ha="left", va="bottom", arrowprops=line if far > 15 else None)
                break


def _around(point, width, height, unit):
    """Boxes of a label's size about a point, (distance, (left, bottom, right, top)), near ones
    first: at its sides, above and below, and between."""
    ways = ((1, 0), (-1, 0), (0.4, 1), (0.4, -1), (-0.4, 1), (-0.4, -1), (1, 1), (1, -1), (-1, 1),
            (-1, -1), (0, 1), (0, -1))
    for far in (9, 15, 23, 33, 45, 59, 75):
        for across, up in ways:
            left = point[0] + far * unit * across - width * (1 - across) / 2
            bottom = point[1] + far * unit * up - height * (1 - up) / 2
            yield far, (left, bottom, left + width, bottom + height)


def _overlap(a, b):
    return a[0] < b[2] + 2 and b[0] < a[2] + 2 and a[1] < b[3] and b[1] < a[3]


def quality_and_time(panels, named, most):
    """Each objective's runs, {name: (CPU seconds of its runs, their values)}, as a point at the
    medians and lines over the ranges, coloured by family, a panel for each (title, what is on its
    axis). `named` says which get their names, by title. Medians above `most` (by axis) stand at the
    upper edge, with an arrow: they are lost or nearly so."""
    figure, axes = plt.subplots(2, len(panels) // 2 + len(panels) % 2, figsize=(14.5, 11.5))
    figure.subplots_adjust(left=0.05, right=0.99, top=0.97, bottom=0.05, wspace=0.2, hspace=0.2)
    for ax, ((title, ylabel), found) in zip(axes.flat, panels.items(), strict=False):
        edge, spots = most[ylabel], {}
        for name, (seconds, values) in found.items():
            x, y = float(np.median(seconds)), float(np.median(values))
            look = FAMILY_LOOKS[FAMILY[name]]
            lost = not y < edge
            spots[name] = (x, edge if lost else y)
            if not lost:
                ax.plot([x, x], [min(values), min(max(values), edge)], color=look["color"],
                        linewidth=1, alpha=0.7)
                ax.plot([min(seconds), max(seconds)], [y, y], color=look["color"], linewidth=1,
                        alpha=0.7)
            ax.scatter(*spots[name], s=90 if lost else 38, color=[look["color"]], zorder=3,
                       marker="$\\uparrow$" if lost else look["marker"], linewidths=0)
        ax.set(xscale="log", yscale="log", xlabel="CPU seconds of training", ylabel=ylabel,
               title=title)
        low, high = ax.get_xlim()
        ax.set_xlim(low / 1.1, high * 1.25)
        low, _ = ax.get_ylim()
        ax.set_ylim(low / 1.1, edge * (edge / low) ** 0.05)
        plotting.label_log(ax.xaxis)
        plotting.label_log(ax.yaxis)
        texts = {nice(name): spots[name] for name in named[title] if name in spots}
        place_labels(ax, texts, list(spots.values()))
    for ax in axes.flat[len(panels):]:
        ax.set_axis_off()
        handles = [ax.scatter([], [], label=family, s=60, **look)
                   for family, look in FAMILY_LOOKS.items()]
        ax.legend(handles=handles, loc="center", fontsize=13, frameon=False,
                  title="medians and ranges of three seeds;\nan arrow: above the edge or lost",
                  title_fontsize=11)
    plt.show()


def bands(series, ax):
    """Mean over runs as a line and their range as a band, {name: (x, (runs, points))}."""
    looks = ("-", "--", "-.", ":")
    for i, (name, (x, runs)) in enumerate(series.items()):
        color = plotting.PALETTE[i]
        ax.plot(x, runs.mean(0), color=color, linestyle=looks[i % 4], linewidth=2, label=name)
        ax.fill_between(x, runs.min(0), runs.max(0), color=color, alpha=0.18, linewidth=0)
    ax.set_yscale("log")
    plotting.label_log(ax.yaxis)
    ax.legend()
    return ax


def requests_by_class(answers, laws, forget):
    """A row for each student, a column for each class that it is asked for; the modes of that class
    as contours."""
    _, axes = plt.subplots(len(answers), len(laws), figsize=(12.5, 6.6), layout="constrained",
                           sharex=True, sharey=True)
    for i, (name, by_class) in enumerate(answers.items()):
        for k, (ax, drawn) in enumerate(zip(axes[i], by_class, strict=True)):
            plotting.scatter(drawn, ax, target=laws[k], limit=3)
            title = f"asked for {k}" + (", to be forgotten" if k == forget else "")
            ax.set(title="" if i else title, ylabel="")
            ax.label_outer()
        axes[i, 0].set_ylabel(name)
    plt.show()


def quality_and_calls(panels):
    """Quality by the number of network calls for a sample: a panel for each (title, what is on its
    axis) with students' lines, the teacher's line, and students of one call as points."""
    _, axes = plt.subplots(1, len(panels), figsize=(14, 5), layout="constrained")
    for ax, ((title, ylabel), (lines, teacher, points)) in zip(axes, panels.items(), strict=True):
        for i, (name, (x, y)) in enumerate(lines.items()):
            ax.plot(x, y, marker="osD^v<"[i], color=plotting.PALETTE[i], linewidth=1.8,
                    label=nice(name))
        ax.plot(*teacher, "--", color="black", linewidth=1.8, label="the teacher")
        for name, y in points.items():
            ax.plot(1, y, FAMILY_LOOKS[FAMILY[name]]["marker"], color="0.25", markersize=6)
        ax.set(xscale="log", yscale="log", xlabel="calls for a sample", ylabel=ylabel, title=title,
               xticks=(1, 2, 4, 8, 16, 35), xticklabels=(1, 2, 4, 8, 16, 35))
        ax.minorticks_off()
        plotting.label_log(ax.yaxis)
        ax.set_xlim(0.42, 42)
        ax.legend(fontsize=10, loc="upper right")
        for name, y in points.items():
            ax.annotate(nice(name), (1, y), (-8, 0), textcoords="offset points", ha="right",
                        va="center", fontsize=10)
    plt.show()
