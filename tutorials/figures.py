"""Figures that one notebook alone draws: what dresses them, so that cells keep what is the lesson.

What several notebooks draw is in `minidistill.plotting`. A notebook takes this file with

    try:
        import figures
    except ImportError:  # this notebook was copied alone: the package brings the same file
        from minidistill import tutorial_figures as figures
"""

import matplotlib.pyplot as plt

from minidistill import plotting

__all__ = ["losses_by_kind", "looks_of_losses"]


# 02b_more_losses

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
