"""Critics: networks v(x) that stand for log p(x) / q(x), trained on samples of p and q by any f-divergence's dual."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from minidistill import _validate
from minidistill._random import seeded
from minidistill.divergences.f_divergences import F, FDivergence

__all__ = ["CHUNK", "Critic", "cut", "dual_values", "learn_log_ratio", "train_critic"]

CHUNK = 65_536  # samples that are looked at at once


def learn_log_ratio(samples_p: Tensor, samples_q: Tensor, **training: Any) -> nn.Module:
    """v(x) = log p(x)/q(x) by logistic regression of samples of p against samples of q: that loss, up to a
    constant, is minus the dual of Jensen-Shannon, so the classifier is the Jensen-Shannon critic."""
    return train_critic(F["jensen_shannon"], samples_p, samples_q, **training)


def train_critic(
    divergence: FDivergence,
    samples_p: Tensor,
    samples_q: Tensor,
    critic: nn.Module | None = None,
    *,
    steps: int = 1000,
    batch_size: int = 512,
    learning_rate: float = 3e-3,
    validation: float = 0.2,
    check_every: int = 50,
    seed: int = 0,
    shuffle: bool = False,
    progress: bool = True,
) -> nn.Module:
    """Maximise the dual over v(x) by Adam with a rate that falls to 0; returns the critic of the best validation.

    critic: a module (n, *shape) -> (n,), trained in place; None for a small `Critic`.
    validation: the share of the samples that picks the step to keep: the last ones, so they must come in random
        order, or be shuffled first (by `seed`) with `shuffle=True`.
    Raises ValueError for total variation, whose slope is flat: learn the ratio instead.
    """
    _validate.samples("samples_p", samples_p, least=8)
    _validate.samples("samples_q", samples_q, tuple(samples_p.shape[1:]), least=8)
    steps, batch_size, check_every = (_validate.whole(name, count) for name, count in (
        ("steps", steps), ("batch_size", batch_size), ("check_every", check_every)))
    learning_rate = _validate.positive("learning_rate", learning_rate)
    if float(divergence.log_weight(torch.zeros(()))) == -math.inf:
        raise ValueError(f"{divergence.name} has a flat slope, which trains no critic; wanted method='ratio'")
    rng = torch.Generator().manual_seed(seed)
    order = rng if shuffle else None
    (train_p, check_p), (train_q, check_q) = (cut(x, validation, order) for x in (samples_p, samples_q))
    critic = Critic(torch.cat([train_p, train_q]), seed=seed) if critic is None else critic
    optimizer = torch.optim.Adam(critic.parameters(), learning_rate, betas=(0.9, 0.99))
    best, kept = -math.inf, copy.deepcopy(critic.state_dict())

    def batch(x: Tensor) -> Tensor:
        return x[torch.randint(len(x), (min(batch_size, len(x)),), generator=rng).to(x.device)]

    for step in tqdm(range(1, steps + 1), disable=not progress, desc=f"critic: {divergence.name}", leave=False):
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - (step - 1) / steps)
        v_p, v_q = critic(torch.cat([x_p := batch(train_p), batch(train_q)])).tensor_split([len(x_p)])
        loss = divergence.cost(v_q).mean() - divergence.slope(v_p).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(critic.parameters(), 1.0)
        optimizer.step()
        if step % check_every == 0 or step == steps:
            gain, cost = dual_values(divergence, critic, check_p, check_q)
            now = float(gain.mean() - cost.mean())
            if now > best:
                best, kept = now, copy.deepcopy(critic.state_dict())
    critic.load_state_dict(kept)
    return critic.requires_grad_(False)


@torch.no_grad()
def dual_values(
    divergence: FDivergence, critic: Callable[[Tensor], Tensor], samples_p: Tensor, samples_q: Tensor
) -> tuple[Tensor, Tensor]:
    """What v gains on each sample of p, f'(e^v), and pays on each of q, f*(f'(e^v)), in float64."""
    v_p, v_q = (torch.cat([critic(part) for part in x.split(CHUNK)]).double() for x in (samples_p, samples_q))
    return divergence.slope(v_p), divergence.cost(v_q)


class Critic(nn.Module):
    """v(x), (n,), for x (n, *shape): three layers on inputs scaled by the samples' own mean and spread."""

    mean: Tensor
    std: Tensor

    def __init__(self, samples: Tensor, hidden: int = 64, seed: int = 0) -> None:
        super().__init__()
        flat = samples.detach().flatten(1)
        self.register_buffer("mean", flat.mean(0))
        std = flat.std(0)
        self.register_buffer("std", std.clamp(min=1e-6 * (float(std.max()) or 1.0)))  # in the data's own units
        with seeded(seed):
            self.layers = nn.Sequential(
                nn.Linear(flat.shape[1], hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, 1)
            ).to(flat)
        nn.init.zeros_(self.layers[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.layers[-1].bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.layers((x.flatten(1) - self.mean) / self.std).flatten()


def cut(x: Tensor, share: float, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Everything but the last `share` of the samples, and that; so the samples must come in random order, unless a
    generator is there to shuffle them."""
    if not 0 < _validate.number("held_out or validation", share) < 1:
        raise ValueError(f"held_out or validation is {share!r}; wanted a share between 0 and 1")
    _validate.generator("generator", generator)
    if generator is not None:
        x = x[torch.randperm(len(x), generator=generator, device=generator.device).to(x.device)]
    kept = min(max(2, round(len(x) * (1 - share))), len(x) - 2)
    return x[:kept], x[kept:]
