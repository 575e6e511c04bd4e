"""What an objective is: a loss for the student, and a list of what it needs besides."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import reduce
from typing import Any, Protocol

import torch
from torch import Tensor

from minidistill import _validate
from minidistill.distillation.batch import Batch

__all__ = ["Around", "Needs", "Objective", "Terms", "Through", "check_losses", "term_gradients", "terms_of"]


class Objective(Protocol):
    """What `distill` minimises: `generator_loss(batch)`, one number a sample, (n,), with its graph to the student.

    Two methods more are called where an objective has them:

        critic_loss(batch) -> (n,)
            what the fake network and the ratio learn from; without it there is neither a critic step nor a fake network
        noise_levels(n, settings, progress, generator) -> (n,)
            a law of noise levels of its own; else log-uniform between settings.sigma_min and sigma_max
        before_training(run, settings)
            a phase before the first step: it may train or record on the networks in `run` (`prepare.Run`), and runs
            again, to the same result, on a resume

    What else it wants it says in attributes: see `Needs`.
    """

    def generator_loss(self, batch: Batch, /) -> Tensor: ...


@dataclass(frozen=True)
class Needs:
    """What an objective asks for: each field is an attribute `needs_NAME` of the objective, the last seven without the
    prefix. One that is not there is as below."""

    fake: bool = True  # a network that denoises the student's samples; if not said, whether there is a `critic_loss`
    ratio: bool = False  # a discriminator that learns log p / q, and real samples for it
    real: bool = False  # real samples alone, in the critic's step; in the student's where there is no critic
    student_real: bool = False  # real samples in the student's step too
    features: bool = False  # a fake network with `.features(x, sigma, label)`
    pairs: int = 0  # so many pairs of noise and the teacher's samples
    pair_samples: bool = True  # what the student makes of the pairs' noise, where there are pairs
    uniform: bool = False  # a number in [0, 1) for each sample
    samples: bool = True  # the student's samples from pure noise; False for one that only calls `batch.student`
    target: float = 0.0  # an average of the student without gradient, its half-life in samples; 0 for none
    snapshots: int = 0  # the target is a copy of the student's average, taken anew in each of so many parts of the run
    second_teacher: bool = False  # `distill(..., second_teacher=...)`
    critic_steps: int | None = None  # critic updates for each of the student's, unless the caller says how many
    learning_rate: float | None = None  # of the student, unless the caller says which; and likewise
    warmup: int | None = None  # steps in which that rises
    gradient_clip: float | None = None  # bound on the norm of either gradient
    sigma_init: float | None = None  # where the student reads its input, in standard deviations of the data
    octaves: int = 8  # frequencies of a new student's noise embedding; fewer where its derivative in the level counts
    route: str = "call"  # what the student can be asked once it is trained, one of `networks.jumps.ROUTES`

    @property
    def data(self) -> bool:
        """Whether it compares with real samples."""
        return self.ratio or self.real or self.student_real

    @classmethod
    def of(cls, objective: object) -> Needs:
        """Read off an objective. Raises TypeError for a `needs_...` that there is not, with the nearest name."""
        own = {"critic_steps", "learning_rate", "warmup", "gradient_clip", "sigma_init", "route", "octaves"}
        names = {f.name if f.name in own else f"needs_{f.name}": f.name for f in fields(cls)}
        for attribute in dir(objective):
            if attribute.startswith("needs_") and attribute not in names:
                raise TypeError(_validate.closest(f"{type(objective).__name__}'s attribute", attribute, names))
        said = {name: getattr(objective, attribute) for attribute, name in names.items()
                if hasattr(objective, attribute)}
        return cls(**({"fake": callable(getattr(objective, "critic_loss", None))} | said))


class Terms:
    """An objective whose generator loss is a sum of named terms, so that each one's gradient can be looked at."""

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        raise NotImplementedError

    def generator_loss(self, batch: Batch) -> Tensor:
        return reduce(torch.add, self.terms(batch).values())


class Around(Terms):
    """An objective around another, `objective`: what it does not say itself, needs included, is what that one says."""

    objective: Any

    def __getattr__(self, name: str) -> Any:
        inner = None if name.startswith("__") else self.__dict__.get("objective")  # as it is copied there is none yet
        if inner is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(inner, name)


class Through(Around):
    """An objective that another one sees the batch through: `see` changes it, for both losses, where it is defined."""

    def see(self, batch: Batch) -> Batch:
        return batch

    @property
    def needs_fake(self) -> bool:
        return Needs.of(self.objective).fake

    def critic_loss(self, batch: Batch) -> Tensor:
        loss: Tensor = self.objective.critic_loss(self.see(batch))
        return loss

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        return terms_of(self.objective, self.see(batch))


def terms_of(objective: Any, batch: Batch) -> dict[str, Tensor]:
    """An objective's terms by name, or its one loss."""
    return objective.terms(batch) if hasattr(objective, "terms") else {"loss": objective.generator_loss(batch)}


def term_gradients(objective: Any, batch: Batch, wrt: Any) -> dict[str, list[Tensor]]:
    """The gradient of each term's batch mean in `wrt`: the student's parameters, or `[batch.x0]` for the pull on
    each sample. Zeros where a term does not reach."""
    terms = objective.terms(batch)
    return {
        name: list(torch.autograd.grad(term.mean(), wrt, retain_graph=True, allow_unused=True, materialize_grads=True))
        for name, term in terms.items()
    }


def check_losses(name: str, loss: Any, n: int) -> Tensor:
    """The loss, once it is known to be (n,) with a graph. Raises TypeError, ValueError that name the objective."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"{name} returned {type(loss).__name__}; wanted a tensor ({n},), one loss a sample")
    if loss.shape != (n,):
        raise ValueError(f"{name} returned a tensor of shape {tuple(loss.shape)}; wanted ({n},), one loss a sample: "
                         "sum over everything but the first axis")
    if not loss.requires_grad:
        raise ValueError(f"{name} returned a loss without a graph: nothing to train by. Is something detached that "
                         "should not be?")
    return loss


