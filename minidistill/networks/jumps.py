"""Students of two levels: J(x, sigma, to, label) takes x from level sigma to level `to`, along the probability flow.

Every jump is the straight line from x to a point at level 0, its aim g, as far as `to`:

    J(x, sigma, to) = (to / sigma) x + (1 - to / sigma) g(x, sigma, to)

so J(x, s, s) = x whatever the network says (Kim 2024, CTM, equation 9). On the diagonal, to = sigma, where no way is
gone, the best aim is the denoiser: so a student may start from a teacher's weights, told `to` by an embedding that is 0
at first. In flow's coordinates (processes/) z = (1 - t) x, where lines stay lines, (z - g) / t is the mean velocity of
the way; a consistency function is a jump to 0, which lands on its aim.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from minidistill import _validate

__all__ = ["HIGHEST", "LOWEST", "ROUTES", "TOP", "WhereTo", "angles", "jump", "told_where", "way_down"]

#: EDM's levels, 0.002 to 80, in standard deviations of the data: where consistency functions end, and paths begin.
LOWEST, HIGHEST = 0.004, 160.0
#: High enough where the level need not be EDM's: the noised data deviate by one part in 800 more than the noise alone.
TOP = 20.0

#: What a student can be asked: one call (and its `levels`); where a path ends, from any level; the same, and it is gone
#: there along a line, so that one may stop on the way; where it is at any other level.
ROUTES = {"call": False, "end": False, "line": True, "jump": True}  # name: whether it can stop on the way


class WhereTo(nn.Sequential):
    """The embedding of the level a jump goes to, given as its angle arctan(to / sigma_data), (n, width): zeros at
    first. The angle, TrigFlow's time, runs from 0 to pi / 2 and is nowhere steep."""

    def __init__(self, embedding: nn.Module, *layers: nn.Module) -> None:
        super().__init__(embedding, *layers)
        for parameter in self[-1].parameters():
            if not parameter.is_meta:  # where checkpoints are looked at, and nothing is to be computed
                nn.init.zeros_(parameter)


def jump(
    aim: Callable[..., Tensor], x: Tensor, sigma: float | Tensor, to: float | Tensor, label: Tensor | None = None
) -> Tensor:
    """J from the aim g(x, sigma, label, to): x (n, *shape), sigma > 0 and to floats or (n,)."""
    share = _validate.broadcast_sigma(to, x, name="to") / _validate.broadcast_sigma(sigma, x, positive=True)
    return (share * x + (1 - share) * aim(x, sigma, label, to)).to(x.dtype)


def told_where(network: nn.Module) -> nn.Module:
    """A network that computes what `network` does and can learn to heed the level that a jump goes to.

    Raises TypeError for a network that is not `MLP` or `UNet`: nobody else's can be told.
    """
    config: dict[str, Any] | None = getattr(network, "config", None)
    if config is None or config.get("kind") not in ("mlp", "unet"):
        raise TypeError(f"network is {type(network).__name__}; a student that jumps has to be told where to: wanted an "
                        "MLP or a UNet")
    rest = {name: value for name, value in config.items() if name != "kind"}
    told = type(network)(**{**rest, "shape": tuple(rest["shape"]), "jumps": True})
    told.load_state_dict(network.state_dict() | {name: value for name, value in told.state_dict().items()
                                                 if name.startswith("where_to.")})
    return told.to(next(network.parameters()).device)


def angles(steps: int, top: float) -> list[float]:
    """Levels (steps,) from `top` down, in standard deviations of the data, whose angles arctan(level) are evenly spaced
    towards 0; 0 itself is left out."""
    return [math.tan(math.atan(top) * (1 - i / steps)) for i in range(steps)]


@torch.no_grad()
def way_down(
    student: Any, x: Tensor, levels: list[float], label: Tensor | None, noises: list[Tensor], gamma: float,
    after_call: Callable[[], object],
) -> Tensor:
    """x at levels[0] -> samples, one call for each level.

    gamma: the share of each next level that is noise anew (Kim 2024, algorithm 3): the jump goes to
        sqrt(1 - gamma^2) of that level and noise of gamma of it is added. 0 is deterministic; 1 is the multistep
        sampling of consistency models (Song 2023, algorithm 1). A student of "end" stands at `LOWEST` after a call, so
        it takes as much less noise: sqrt(level^2 - LOWEST^2).
    """
    lowest = LOWEST * student.denoiser.sigma_data
    for i, level in enumerate(levels):
        after = levels[i + 1] if i + 1 < len(levels) else 0.0
        if ROUTES[student.route]:
            out, fresh = student(x, label, level, to=math.sqrt(1 - gamma**2) * after), gamma * after
        else:
            out, fresh = student(x, label, level), math.sqrt(max(after**2 - lowest**2, 0.0))
        x = _validate.denoised(out, x, "student")
        x = x + fresh * noises[i] if after > 0 and fresh > 0 else x
        after_call()
    return x
