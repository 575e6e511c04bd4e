"""What a network may predict about x_t = alpha x0 + sigma e, and how one prediction becomes another.

x0, the noise e (eps), v, the score and the velocity each give one linear equation in the two unknowns (x0, e), and
x_t gives the other: a prediction is solved for the pair and the pair makes any other. Nothing here knows a clock;
`Process` (process.py) puts in its alpha and sigma, and where a velocity needs them their rates.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from minidistill import _validate

__all__ = ["FROM_PAIR", "FROM_X0", "MADE_OF", "TO_PAIR", "TO_X0", "convert", "score_from_denoiser"]

#: What a network may predict, solved for both unknowns: f(x_t, prediction, alpha, sigma, alpha', sigma') -> (x0, e).
#: Each is two equations, alpha x0 + sigma e = x_t and the prediction's own. Only "velocity" reads the rates.
TO_PAIR: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "x0": lambda x, x0, a, s, *_: (x0, (x - a * x0) / s),
    "eps": lambda x, eps, a, s, *_: ((x - s * eps) / a, eps),
    "v": lambda x, v, a, s, *_: ((a * x - s * v) / (a**2 + s**2), (a * v + s * x) / (a**2 + s**2)),
    "score": lambda x, score, a, s, *_: ((x + s**2 * score) / a, -s * score),  # Tweedie
    "velocity": lambda x, u, a, s, da, ds: ((ds * x - s * u) / (a * ds - s * da), (a * u - da * x) / (a * ds - s * da)),
}
#: The way back, which is each prediction's definition: f(x0, e, alpha, sigma, alpha', sigma').
FROM_PAIR: dict[str, Callable[..., Tensor]] = {
    "x0": lambda x0, e, a, s, *_: x0,
    "eps": lambda x0, e, a, s, *_: e,
    "v": lambda x0, e, a, s, *_: a * e - s * x0,  # Salimans & Ho 2022
    "score": lambda x0, e, a, s, *_: -e / s,  # of p(x_t | x0); its mean given x_t is that of p(x_t)
    "velocity": lambda x0, e, a, s, da, ds: da * x0 + ds * e,  # d x_t / dt at fixed x0, e; its mean moves p_t
}
#: The same to and from x0 for those that need no clock: f(x_t, prediction, alpha, sigma) and f(x_t, x0, alpha, sigma).
TO_X0: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    name: lambda x, prediction, a, s, f=f: f(x, prediction, a, s)[0]  # type: ignore[misc]
    for name, f in TO_PAIR.items() if name != "velocity"
}
FROM_X0: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    name: lambda x, x0, a, s, f=f: f(x0, (x - a * x0) / s, a, s)  # type: ignore[misc]
    for name, f in FROM_PAIR.items() if name != "velocity"
}


#: What these predictions are made of, x0 and e: for the other one, a source is divided by sigma or by alpha.
MADE_OF = {"x0": "x0", "eps": "e", "v": "both", "score": "e", "velocity": "both"}


def convert(
    prediction: Tensor, x: Tensor, alpha: Tensor | float, sigma: Tensor | float, source: str, target: str,
    rates: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Turn one prediction about x_t = alpha x0 + sigma e into another: x0, eps, v, score or velocity.

    `prediction` and `x` are (n, *shape); `alpha`, `sigma` and both `rates` (alpha', sigma'), which only the velocity
    needs, floats or (n,). `Process.convert` knows all four numbers from t.

    ValueError: unknown names, other shapes, no rates; an alpha or sigma of 0 where the target can't be told from the
    source (no noise from x0 at sigma = 0, no x0 from noise at alpha = 0, no score without noise); infinite rates.
    """
    to_pair = _validate.choose("source", source, TO_PAIR)
    from_pair = _validate.choose("target", target, FROM_PAIR)
    _validate.floats("x", x)
    _validate.like("prediction", prediction, "x", x)
    alpha = _validate.broadcast_sigma(alpha, x, name="alpha")
    sigma = _validate.broadcast_sigma(sigma, x)
    if rates is None and "velocity" in (source, target):
        raise ValueError("rates=None: wanted (d alpha / dt, d sigma / dt) for a velocity; Process.convert has them")
    slopes = [_validate.tensor("rates", rate, x.dtype, x.device) for rate in rates or ()]
    slopes = [slope.reshape(-1, *[1] * (x.ndim - 1)) if slope.ndim == 1 else slope for slope in slopes]
    if x.device.type == "cpu":  # an accelerator would have to be waited for
        _check_ends(source, target, alpha, sigma, slopes)
    return from_pair(*to_pair(x, prediction, alpha, sigma, *slopes), alpha, sigma, *slopes)


def _check_ends(source: str, target: str, alpha: Tensor, sigma: Tensor, rates: list[Tensor]) -> None:
    needs_noise = target == "score" or (source == "x0" and target != "x0")
    needs_signal = MADE_OF[source] == "e" and MADE_OF[target] != "e"
    for name, value, needed in (("sigma", sigma, needs_noise), ("alpha", alpha, needs_signal)):
        if needed and _validate.any_of(value == 0):
            raise ValueError(f"{name} is 0 at some time, where {target} can't be told from {source}; wanted {name} > 0")
    if any(_validate.any_of(~rate.isfinite()) for rate in rates):
        raise ValueError("alpha or sigma changes infinitely fast at some time, where there is no velocity; wanted "
                         "times inside the process's range")


def score_from_denoiser(denoised: Tensor, x: Tensor, sigma: float | Tensor) -> Tensor:
    """Tweedie in EDM coordinates: score = (D - x) / sigma^2, shaped like x."""
    _validate.floats("x", x)
    _validate.like("denoised", denoised, "x", x)
    return (denoised - x) / _validate.broadcast_sigma(sigma, x, positive=True).square()
