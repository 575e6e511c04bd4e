"""CTM: jumps from any level to any lower one, consistent along the paths of a teacher's solver (Kim 2024).

From x at level t the solver walks to u, and from there the student jumps to s, held fixed; the student's own jump from
t to s has to land in the same place. With u next to t that is consistency distillation, with u = s the solver's own
answer is learned; in between, both. Landings are compared by their ends: the student's average takes them on to 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from minidistill.distillation.batch import Batch, column, no_weights, per_sample
from minidistill.distillation.objective import Terms
from minidistill.distillation.objectives.adversarial import adversarial
from minidistill.distillation.objectives.consistency import Grid, one_step_down, part_of_a_step
from minidistill.distillation.objectives.matching import ratio_loss
from minidistill.distillation.settings import Settings
from minidistill.networks.jumps import LOWEST, TOP

__all__ = ["ConsistencyTrajectory"]


@dataclass(frozen=True)
class ConsistencyTrajectory(Terms):
    """|G(J(x_t, t, s), s) - G(sg J(solver(x_t, t, u), u, s), s)|^2 / sigma_data^2, G a jump to the end by the student's
    average, and the denoising loss on the diagonal, from which the score is read off (Kim 2024, equations 8 to 10).

    levels: of the grid on which t > u >= s lie (Karras 2022), from `sigma_init` down to `LOWEST`.
    scattered: four samples of five have a grid of their own, moved by a part of a step, and s anywhere on it: all
        levels are met, so that one may jump from any to any. False for the grid's own alone, as in the paper.
    whole: share of the samples whose jump goes all the way, s the grid's lowest level: those that one call is made of.
        0 in the paper, where s is any level at or below u alike.
    longest: Heun steps of the teacher from t to u at most; their number is drawn, uniformly.
    landing: weight of the same difference where the jumps land, at s; 0 in the paper, whose jumps are only as good as
        their ends need.
    denoising: weight of |g(x_t, t, t) - x0|^2, in units in which it is about 1 at every level.
    teacher: the teacher's denoised sample in x0's place there, which is its mean; False is the paper's.
    adversarial_weight: of a term through a discriminator of noised samples of one call, as DMD2's; 0 for none.
    sigma_init: the highest level, in standard deviations of the data.
    needs_target: half-life of the average that gives the answers held fixed, in samples.
    """

    levels: int = 18
    scattered: bool = True
    whole: float = 0.0
    longest: int = 17
    landing: float = 0.0
    denoising: float = 1.0
    teacher: bool = True
    adversarial_weight: float = 0.0
    needs_target: float = 2000.0
    needs_real = True
    needs_student_real = True
    needs_uniform = True
    needs_fake = False
    sigma_init: float = TOP
    route = "jump"

    @property
    def needs_ratio(self) -> bool:
        return self.adversarial_weight != 0

    @property
    def needs_samples(self) -> bool:
        return self.needs_ratio

    @property
    def grid(self) -> Grid:
        return Grid(self.levels - 1, self.sigma_init)

    def noise_levels(self, n: int, settings: Settings, progress: float, generator: torch.Generator) -> Tensor:
        """t of each sample, any level of its grid but the lowest, (n,)."""
        device = generator.device
        position = torch.randint(1, self.levels, (n,), generator=generator, device=device).float()
        if self.scattered:
            position = position - part_of_a_step(n, generator)
        return settings.sigma_data * self.grid.level(position)

    def critic_loss(self, batch: Batch) -> Tensor:
        return ratio_loss(batch)

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        assert batch.real is not None
        assert batch.student is not None
        x, t, label = batch.real + column(batch.sigma, batch.real) * batch.noise, batch.sigma, batch.real_label
        above, s, u = self.solve(batch, x)
        frozen = batch.target or batch.frozen or batch.student
        lowest = LOWEST * batch.sigma_data
        with torch.no_grad():
            there = frozen(above, u, label, to=s)
            wanted = to_end(frozen, there, s, lowest, label)
        mine = batch.student(x, t, label, to=s)
        got = to_end(frozen, mine, s, lowest, label)
        terms = {"consistency": per_sample((got - wanted).square()) / batch.sigma_data**2}
        if self.landing:
            terms["landing"] = self.landing * per_sample((mine - there).square()) / batch.sigma_data**2
        if self.denoising:
            with torch.no_grad():
                clean = batch.teacher(x, t, label) if self.teacher else batch.real
            error = per_sample((batch.student(x, t, label, to=t, aim=True) - clean).square())
            terms["denoising"] = self.denoising * error * (1 / t.square() + 1 / batch.sigma_data**2)
        if self.adversarial_weight:
            assert batch.ratio is not None
            logit = batch.ratio(batch.xt, t, batch.label)
            terms["adversarial"] = self.adversarial_weight * adversarial(logit, batch, no_weights(x))
        return terms

    @torch.no_grad()
    def solve(self, batch: Batch, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(the point at u on the path through x, s, u): Heun steps on the grid, each sample as many as were drawn."""
        assert batch.uniform is not None
        top = self.grid.position(batch.sigma / batch.sigma_data)
        farthest = (top - 1e-2).ceil().clamp(1, self.longest)  # steps down to the lowest level, rounding aside
        steps = 1 + (batch.uniform * farthest).floor()
        rest = (batch.uniform * farthest) % 1  # uniform too, and as good as independent
        point = x.clone()
        for k in range(int(steps.max())):
            going = steps > k
            label = None if batch.real_label is None else batch.real_label[going]
            upper, lower = (column(self.down(top, k + i, batch)[going], x) for i in (0, 1))
            point[going] = one_step_down(batch.teacher, point[going], upper, lower, label)
        u = self.down(top, steps, batch)
        bottom = (top - steps).clamp(min=0)
        s = ((rest - self.whole) / (1 - self.whole)).clamp(min=0) * (bottom + 1)
        s = (s - 0.5).clamp(min=0) if self.scattered else s.floor()
        return point, batch.sigma_data * self.grid.level(s.minimum(bottom)), u

    def down(self, top: Tensor, steps: Tensor | int, batch: Batch) -> Tensor:
        """The level that lies so many steps below a position, in data units."""
        return batch.sigma_data * self.grid.level((top - steps).clamp(min=0))


def to_end(student: Callable[..., Tensor], x: Tensor, s: Tensor, lowest: float, label: Tensor | None) -> Tensor:
    """x at level s (n,) taken on to the end of its path; where s is the lowest level, x itself."""
    return torch.where(column(s, x) > 1.001 * lowest, student(x, s, label, to=0.0), x)
