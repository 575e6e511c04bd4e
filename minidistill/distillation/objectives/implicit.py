"""Score implicit matching: minimise a distance between the scores themselves.

SIM (Luo 2024), SiD (Zhou 2024) and SiDA (Zhou 2025) are one family; the distance and alpha are its parameters. Scores
are compared as denoisers in standard deviations of the data, y = (D_q - D_p) / sigma_data, which puts all noise levels
on one scale:

    loss = 2 (1 - alpha) d(y) - d'(y) . (D_q(x_t) - x0) / sigma_data,    differentiated through x_t and x0.

The second part moves y with the sampling law frozen (SIM's score-gradient theorem), the first moves the law with y
frozen. So alpha = 1 is SIM and alpha = 1/2 has the exact gradient of E_q d(y), for every distance (known for squared
L2; for the others derived here); SiD is d = |y|^2 / 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.functional import softplus

from minidistill import _validate
from minidistill.distillation.batch import Batch, dmd_scale, no_weights, per_sample
from minidistill.distillation.objective import Terms
from minidistill.distillation.objectives.adversarial import adversarial
from minidistill.distillation.objectives.matching import fake_loss
from minidistill.divergences import ScoreDistance
from minidistill.score_matching import edm_weight

__all__ = [
    "HALF_SQUARED_L2", "AdversarialScoreIdentity", "RealUID", "ScoreIdentity", "ScoreImplicitMatching", "feature_logit",
    "implicit_loss",
]

HALF_SQUARED_L2 = ScoreDistance("half_squared_l2", lambda y: per_sample(y.square()) / 2, lambda y: y)


def implicit_loss(batch: Batch, distance: ScoreDistance, alpha: float, normalise: bool) -> tuple[Tensor, Tensor]:
    """The family's loss, (n,), and the scale that it was multiplied by, (n, 1, ..., 1): DMD's, or 1."""
    teacher_x0, fake_x0 = batch.denoise_both(batch.xt)
    y = (fake_x0 - teacher_x0) / batch.sigma_data
    scale = dmd_scale(batch.x0, teacher_x0, batch.sigma_data) if normalise else no_weights(y)
    loss = -per_sample(distance.gradient(y) * (fake_x0 - batch.x0) / batch.sigma_data)
    if alpha != 1:
        loss = loss + 2 * (1 - alpha) * distance.value(y)
    return scale.flatten() * loss, scale


@dataclass(frozen=True)
class ScoreImplicitMatching(Terms):
    """E_{x ~ sg[q_sigma]} d(D_q - D_p) for any distance d (Luo 2024, theorem 3.1); other alphas free the law.

    d' has to be continuous where samples are: autograd does not see a jump. Only L2 has one, at y = 0, and only in
    one dimension does it matter.

    warmup, gradient_clip: as `warmup` and `clip` of `distill`; for a distance whose d' is unbounded. A sample that
        leaps away then pulls the harder the farther it is, both at the student and at the critic that has to learn
        where it went (notebook 10).
    """

    distance: ScoreDistance
    normalise: bool = False
    alpha: float = 1.0
    warmup: int = 0
    gradient_clip: float | None = None
    needs_ratio = False

    def critic_loss(self, batch: Batch) -> Tensor:
        return fake_loss(batch)

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        return {"implicit": implicit_loss(batch, self.distance, self.alpha, self.normalise)[0]}


@dataclass(frozen=True)
class ScoreIdentity(Terms):
    """SiD (Zhou 2024): (1 - alpha) |D_p - D_q|^2 + (D_p - D_q) . (D_q - x0), gradient through both networks' inputs.

    alpha = 1/2 has half the exact gradient of the Fisher divergence E_q |D_p - D_q|^2, alpha = 1 is half SIM with
    squared L2, and alpha = 1.2 is the paper's empirical choice for images. None, the default, is 1.2 for images,
    samples (c, h, w), and 1 for samples of any other shape.

    Above 1 the first part has the wrong sign: at small levels it pushes a wide student outwards, and over all levels
    calls far samples back only weakly, so a student that leaps away from the data is lost, as all were on a lattice of
    25 modes (notebook 10). By default and above 1 it is trained slowly, behind a critic that keeps up.
    """

    alpha: float | None = None
    normalise: bool = True
    needs_ratio = False

    def alpha_for(self, x0: Tensor) -> float:
        """The alpha that samples (n, *shape) are matched by."""
        if self.alpha is not None:
            return self.alpha
        return 1.2 if x0.ndim == 4 else 1.0

    @property
    def slow(self) -> bool:
        return self.alpha is None or self.alpha > 1

    @property
    def critic_steps(self) -> int | None:
        return 5 if self.slow else None

    @property
    def learning_rate(self) -> float | None:
        return 5e-4 if self.slow else None

    def critic_loss(self, batch: Batch) -> Tensor:
        return fake_loss(batch)

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        alpha = self.alpha_for(batch.x0)
        return {"identity": implicit_loss(batch, HALF_SQUARED_L2, alpha, self.normalise)[0]}


@dataclass(frozen=True)
class AdversarialScoreIdentity(Terms):
    """SiDA (Zhou 2025): SiD at alpha = 1 plus an adversarial term without a parameter of its own. The logit is the mean
    over channels of the fake network's features: a U-Net's bottleneck, with a logit for every place of the image, or
    an MLP's last hidden layer, with one.

    weight: of the generator's adversarial term, on SiD's own scale; critic_weight: of the logistic regression beside
    the fake's denoising loss, both of which shape the same features. With three critic steps instead of five, runs
        with an exact teacher ran away, and one of five still did without a clip.
    """

    alpha: float = 1.0
    normalise: bool = True
    weight: float = 1.0
    critic_weight: float = 1.0
    critic_steps: int = 5
    gradient_clip: float = 1.0
    needs_ratio = False
    needs_real = True
    needs_features = True

    def critic_loss(self, batch: Batch) -> Tensor:
        xt, _, sigma, label = batch.real_and_fake()
        real, fake = feature_logit(batch.fake, xt, sigma, label).chunk(2)
        logistic = (softplus(-real) + softplus(fake)).flatten(1).mean(1)
        return fake_loss(batch) + self.critic_weight * logistic

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        loss, scale = implicit_loss(batch, HALF_SQUARED_L2, self.alpha, self.normalise)
        logit = feature_logit(batch.fake, batch.xt, batch.sigma, batch.label)
        return {"identity": loss, "adversarial": self.weight * adversarial(logit, batch, scale)}


@dataclass(frozen=True)
class RealUID(Terms):
    """Inverse distillation with real data (Kornilov 2025, arXiv 2509.22459). The fake network learns

        alpha |D_q(x_t) - (beta / alpha) x0|^2 + (1 - alpha) |D_q(y_t) - ((1 - beta) / (1 - alpha)) y|^2,    y real,

    and the student minimises (alpha / 2) (|D_p - (beta / alpha) x0|^2 - |D_q - (beta / alpha) x0|^2), gradient through
    both networks' inputs: one game, whose value is 0 where the laws are equal. With data in the fake's loss a wrong
    teacher can be corrected. alpha = beta = 1 is UID without data: Fisher's divergence, `ScoreIdentity(0.5)`.

    alpha, beta: 0.92 and 0.94 in the paper, without classes. normalise: DMD's per-sample scale.
    """

    alpha: float = 0.92
    beta: float = 0.94
    normalise: bool = True
    gradient_clip: float = 1.0
    needs_ratio = False
    needs_real = True

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            if not 0 < _validate.number(name, getattr(self, name)) <= 1:
                raise ValueError(f"{name}={getattr(self, name)!r}: wanted a number above 0 and at most 1")
        if self.alpha == 1 and self.beta != 1:
            raise ValueError(f"beta={self.beta!r} with alpha=1, which leaves data out: wanted beta=1")

    def critic_loss(self, batch: Batch) -> Tensor:
        xt, x0, sigma, label = batch.real_and_fake()
        real, fake = (values.flatten(1) for values in batch.fake(xt, sigma, label).chunk(2))
        y, x = (values.flatten(1) for values in x0.chunk(2))
        loss = self.alpha * (fake - self.beta / self.alpha * x).square().mean(1)
        if self.alpha < 1:
            loss = loss + (1 - self.alpha) * (real - (1 - self.beta) / (1 - self.alpha) * y).square().mean(1)
        return edm_weight(batch.sigma, batch.sigma_data) * loss

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        teacher_x0, fake_x0 = batch.denoise_both(batch.xt)
        scale = dmd_scale(batch.x0, teacher_x0, batch.sigma_data) if self.normalise else no_weights(teacher_x0)
        teachers, fakes = (x - self.beta / self.alpha * batch.x0 for x in (teacher_x0, fake_x0))
        loss = self.alpha / 2 * per_sample(teachers.square() - fakes.square()) / batch.sigma_data**2
        return {"identity": scale.flatten() * loss}


def feature_logit(fake: Any, x: Tensor, sigma: Tensor, label: Tensor | None) -> Tensor:
    """The mean over channels of a denoiser's features: (n, 1) of an MLP's, (n, h, w) of a U-Net's."""
    network = getattr(fake, "module", fake)  # what several processes share is wrapped
    features = network.features(x, sigma, label)
    return features.mean(1, keepdim=features.ndim == 2)
