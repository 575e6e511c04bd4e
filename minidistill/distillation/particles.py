"""Particles without a student: the same flows in which nothing is learned but what pulls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from minidistill import _validate
from minidistill.divergences import F, FDivergence
from minidistill.divergences.f_critics import Critic, dual_values, train_critic

__all__ = ["Flow", "particle_flow", "wasserstein_flow"]


@dataclass(frozen=True)
class Flow:
    """Where particles went: `positions` (steps + 1, n, *shape), the first the start, and `energies`, the divergence or
    another number after each step, (steps + 1,) or empty."""

    positions: Tensor
    energies: Tensor


@torch.no_grad()
def particle_flow(
    x: Tensor, draw: Callable[[], Tensor], velocity: Callable[[Tensor, Tensor], Tensor], *, steps: int,
    size: float = 1.0,
) -> Flow:
    """x <- x + size V(x, real), `steps` times, each on real samples drawn anew: any rule of the sample objectives, such
    as `Drifting().velocity(x, real, None, None)`, without a student to follow."""
    steps, size = _validate.whole("steps", steps), _validate.positive("size", size)
    _validate.samples("x", x)
    positions = [x]
    for _ in range(steps):
        positions.append(positions[-1] + size * velocity(positions[-1], draw()))
    return Flow(torch.stack(positions), torch.empty(0))


def wasserstein_flow(
    x: Tensor, real: Tensor, divergence: FDivergence = F["jensen_shannon"], *, steps: int, size: float = 0.1,
    rounds: int = 4, inner: int = 20, critic_steps: int = 50, seed: int = 0, progress: bool = True,
) -> Flow:
    """JKO steps of D_f(p || q) from particles x (n, *shape) of q to real samples (m, *shape) of p (Fan 2022).

    Each step minimises |x - x_k|^2 / (2 a) - f*(f'(r(x))) over where the particles are, in `inner` gradient steps, a =
    `size` times the variance of the real samples. The critic log r is learned on what the particles are by then
    (`divergences.f_critics`), and again, `rounds` times, since the step is implicit: it is downhill where it ends.

    Returns: a `Flow`, whose energies are the dual's value, a lower bound of D_f, on the particles after each step.
    Raises ValueError for counts or sizes that are not positive and samples that do not fit.
    """
    counts = {"steps": steps, "rounds": rounds, "inner": inner, "critic_steps": critic_steps}
    steps, rounds, inner, critic_steps = (_validate.whole(name, count) for name, count in counts.items())
    _validate.samples("x", x, least=8)
    _validate.samples("real", real, tuple(x.shape[1:]), least=8)
    a = _validate.positive("size", size) * float(real.var())
    critic = Critic(torch.cat([real, x]), seed=seed)
    order = torch.Generator().manual_seed(seed)

    def learn(now: Tensor, number: int, steps: int = critic_steps) -> None:
        shuffled_real, shuffled = (each[torch.randperm(len(each), generator=order)] for each in (real, now))
        train_critic(divergence, shuffled_real, shuffled, critic.requires_grad_(True), steps=steps,
                     seed=seed + number, progress=False)

    def energy(now: Tensor) -> Tensor:
        gain, cost = dual_values(divergence, critic, real, now)
        return gain.mean() - cost.mean()

    learn(x, 0, 8 * critic_steps)
    positions, energies = [x], [energy(x)]
    for k in tqdm(range(steps), disable=not progress, desc="JKO steps", leave=False):
        now = positions[-1]
        for turn in range(rounds):
            for _ in range(inner):
                at = now.detach().requires_grad_()
                uphill = torch.autograd.grad(divergence.cost(critic(at)).sum(), at)[0]
                now = now - a / inner * ((now - positions[-1]) / a - uphill)
            learn(now, 1 + k * rounds + turn)
        positions.append(now)
        energies.append(energy(now))
    return Flow(torch.stack(positions), torch.stack(energies))
