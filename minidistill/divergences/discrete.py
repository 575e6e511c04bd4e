"""Losses for discrete diffusion: learning the ratios p(y) / p(x) between a state x and its neighbours y.

The concrete score of a distribution over finitely many states is the vector of ratios s(x)_y = p(y) / p(x): it needs no
normaliser, and the reversed jump process runs on it. Networks give its logarithm, so that it is positive. Log-scores,
ratios and weights are (n, *neighbours): (n, k) for k states, (n, length, k) for sequences in which neighbours differ in
one token. Losses are (n,), sums over the neighbours, in nats.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "concrete_log_score", "denoising_score_entropy_loss", "generalised_kl_bregman", "score_entropy_loss",
]


def concrete_log_score(log_prob: Tensor, state: Tensor) -> Tensor:
    """log p(y) - log p(x) for every y, (n, ..., k), from log p (n, ..., k), normalised or not, and states x (n, ...).

    The entry of x itself is 0. With log p = log p(y) + log q(x_t | y), a teacher's prior and the corruption, this is
    the concrete score of the clean posterior given x_t: the target when distilling an autoregressive teacher
    (after Zhang 2025, TCSM). ValueError where log p(x) = -inf: there is no ratio to an impossible state (on an
    accelerator the values are not looked at, and give infinity or NaN).
    """
    _state(log_prob, state)
    own = log_prob.gather(-1, state.unsqueeze(-1))
    if own.device.type == "cpu" and bool((own == -torch.inf).any()):
        where = (own.squeeze(-1) == -torch.inf).nonzero()[0].tolist()
        raise ValueError(f"state at {where} has probability 0; wanted states that can occur, with log_prob above -inf")
    return log_prob - own


def score_entropy_loss(log_scores: Tensor, ratios: Tensor, weights: Tensor | None = None) -> Tensor:
    """sum_y w_y [s_y - a_y log s_y + K(a_y)], (n,), s = exp(log_scores), a = p(y) / p(x), K(a) = a (log a - 1).

    Score entropy (Lou 2024, SEDD): >= 0, and 0 only at s = a where w > 0. An entry for y = x counts nothing if its
    log-score is 0 and its ratio 1. All (n, *neighbours); weights >= 0, e.g. the forward rates, 1 if None.
    """
    _ratios(ratios=ratios, log_scores=log_scores, weights=weights)
    if ratios.device.type == "cpu" and not bool((ratios >= 0).all()):
        raise ValueError(f"ratios holds {ratios.min().item():g}; a ratio of probabilities is never negative")
    k = torch.special.xlogy(ratios, ratios) - ratios
    cross = torch.where(ratios == 0, 0.0, ratios * torch.where(ratios == 0, 0.0, log_scores))  # 0 * -inf is 0
    return _weighted_sum(log_scores.exp() - cross + k, weights)


def denoising_score_entropy_loss(
    log_scores: Tensor, log_transition: Tensor, state: Tensor, weights: Tensor | None = None
) -> Tensor:
    """`score_entropy_loss` against the ratios p_t(y | x0) / p_t(x | x0) of the corruption alone, (n,) (Lou 2024, DSE).

    Given x = x_t their mean over x0 is p_t(y) / p_t(x), so in expectation this is the explicit loss plus a constant
    that the model does not see. log_transition (n, ..., k) is log p_t(y | x0) for every y (-inf allowed); state
    (n, ...) holds x, drawn from it. The entry y = x counts nothing.
    """
    ratios = concrete_log_score(log_transition, state).exp()
    own = torch.nn.functional.one_hot(state, log_transition.shape[-1]).to(torch.bool)
    others = torch.ones_like(ratios) if weights is None else weights
    return score_entropy_loss(log_scores, ratios, others.masked_fill(own, 0.0))


def generalised_kl_bregman(log_target: Tensor, log_model: Tensor, weights: Tensor | None = None) -> Tensor:
    """sum_y w_y [a_y log(a_y / s_y) - a_y + s_y], (n,): the Bregman divergence of u log u between positive vectors
    a = exp(log_target) and s = exp(log_model), which need not sum to one (after Zhang 2025, TCSM).

    The same number as `score_entropy_loss(log_model, a)`, with fewer digits lost near a = s; for vectors that sum to
    one it is KL(a || s). All (n, *neighbours); -inf in log_target is a = 0.
    """
    _ratios(log_target=log_target, log_model=log_model, weights=weights)
    a, empty = log_target.exp(), log_target == -torch.inf
    d = torch.where(empty, 0.0, log_model - log_target)  # log(s / a)
    near = d.abs() < 1
    term = torch.where(near, a * _expm1_beyond_first(torch.where(near, d, 0.0)), log_model.exp() - a - a * d)
    return _weighted_sum(torch.where(empty, log_model.exp(), term), weights)


def _expm1_beyond_first(d: Tensor) -> Tensor:
    """e^d - 1 - d for |d| < 1; near 0, where the difference would be rounding, from the series d^2/2 + d^3/6 + ..."""
    series, few = torch.ones_like(d), torch.where(d.abs() < 0.03, d, 0.0)
    for k in range(9, 2, -1):
        series = 1 + few / k * series
    return torch.where(d.abs() < 0.03, d.square() / 2 * series, torch.expm1(d) - d)


def _weighted_sum(terms: Tensor, weights: Tensor | None) -> Tensor:
    """Sum over all neighbours; a weight of 0 silences its term even where that is infinite."""
    if weights is not None:
        terms = torch.where(weights == 0, 0.0, weights * terms)
    return terms.flatten(1).sum(1)


def _ratios(weights: Tensor | None = None, **tensors: Tensor) -> None:
    shape = next(iter(tensors.values())).shape
    for name, x in [*tensors.items(), *([] if weights is None else [("weights", weights)])]:
        if not x.is_floating_point() or x.ndim < 2 or x.shape != shape:
            wanted = f"{tuple(shape)}" if len(shape) > 1 else "(n, *neighbours)"
            raise ValueError(f"{name} is {x.dtype} of shape {tuple(x.shape)}; wanted floating point {wanted}")
    if weights is not None and weights.device.type == "cpu" and not bool((weights >= 0).all()):
        raise ValueError(f"weights holds {weights.min().item():g}; wanted weights >= 0")


def _state(log_prob: Tensor, state: Tensor) -> None:
    if state.dtype != torch.int64 or state.shape != log_prob.shape[:-1]:
        wanted = f"an int64 tensor of shape {tuple(log_prob.shape[:-1])}"
        raise ValueError(f"state is {state.dtype} of shape {tuple(state.shape)}; wanted {wanted}")
    k = log_prob.shape[-1]
    if state.device.type == "cpu" and state.numel() and (int(state.min()) < 0 or int(state.max()) >= k):
        raise ValueError(f"state runs from {int(state.min())} to {int(state.max())}; wanted 0 to {k - 1}")
