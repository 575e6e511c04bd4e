"""EDM's preconditioning around any network, and what distillation makes of it.

`Denoiser` is teacher and fake network, `Correction` the fake network of an exact teacher, `Generator` the student, and
`Affine` a student of one Gaussian.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from minidistill import _validate

__all__ = ["Affine", "Correction", "Denoiser", "Generator", "Preconditioned", "check_input"]


class Preconditioned(nn.Module):
    """A network F(x, c_noise, label) for noised data of standard deviation sigma_data, whose subclass scales what goes
    into the network and what comes out, so that both are of unit variance."""

    def __init__(self, network: nn.Module, sigma_data: float) -> None:
        super().__init__()
        _validate.positive("sigma_data", sigma_data)
        self.network, self.sigma_data = network, float(sigma_data)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.network.shape  # type: ignore[return-value]

    @property
    def n_classes(self) -> int:
        return self.network.n_classes  # type: ignore[return-value]


class Denoiser(Preconditioned):
    """D(x, sigma, label) = c_skip x + c_out F(c_in x, ln(sigma) / 4, label): EDM's preconditioning
    (Karras 2022, table 1), which keeps the network's input, output and target at unit variance.

    Args:
        network: F(x, c_noise, label), shaped like x.
        sigma_data: the data's standard deviation.

    `autocast` names the lower precision (torch.bfloat16) in which the network computes; None for its own. The
    preconditioning around it keeps the precision of x.
    """

    def __init__(self, network: nn.Module, sigma_data: float) -> None:
        super().__init__(network, sigma_data)
        self.autocast: torch.dtype | None = None

    def __repr__(self) -> str:
        classes = f", {self.n_classes} classes" if self.n_classes else ""
        return (f"Denoiser({type(self.network).__name__}, shape={self.shape}{classes}, "
                f"sigma_data={self.sigma_data:.4g}, {sum(p.numel() for p in self.parameters()):,} parameters)")

    def forward(self, x: Tensor, sigma: float | Tensor, label: Tensor | None = None) -> Tensor:
        """E[x0 | x] estimated: x (n, *shape), sigma a float or (n,) > 0, label (n,) if class-conditional."""
        label = check_input(self, x, label)
        s = _validate.broadcast_sigma(sigma, x, positive=True)
        scale = torch.rsqrt(s.square() + self.sigma_data**2)  # c_in
        c_skip = (self.sigma_data * scale).square()
        c_out = s * self.sigma_data * scale
        c_noise = (s.log() / 4).flatten().expand(len(x))
        if self.autocast is None:
            return c_skip * x + c_out * self.network(scale * x, c_noise, label)
        with torch.autocast(x.device.type, self.autocast):
            out = self.network(scale * x, c_noise, label)
        return c_skip * x + c_out * out.to(x.dtype)

    def features(self, x: Tensor, sigma: float | Tensor, label: Tensor | None = None) -> Tensor:
        """The network's features for the same input: an MLP's last hidden layer (n, c), a U-Net's bottleneck
        (n, c, h, w)."""
        label = check_input(self, x, label)
        s = _validate.broadcast_sigma(sigma, x, positive=True)
        scale = torch.rsqrt(s.square() + self.sigma_data**2)
        c_noise = (s.log() / 4).flatten().expand(len(x))
        with torch.autocast(x.device.type, self.autocast, enabled=self.autocast is not None):
            return self.network.features(scale * x, c_noise, label).to(x.dtype)  # type: ignore[operator]


class Affine(nn.Module):
    """D(x) = mean + std x, each coordinate with its own: as a generator (`Generator(Affine(...), 1.0)`) one Gaussian
    with axes along the coordinates, a student that is too small for most teachers. The noise level is not looked at."""

    n_classes = 0

    def __init__(self, shape: tuple[int, ...], mean: float = 0.0, std: float = 1.0, sigma_data: float = 1.0) -> None:
        super().__init__()
        _validate.positive("std", std)
        _validate.positive("sigma_data", sigma_data)
        self.shape, self.sigma_data = tuple(shape), float(sigma_data)
        self.mean, self.log_std = (nn.Parameter(torch.full(shape, value)) for value in (float(mean), math.log(std)))

    def forward(self, x: Tensor, sigma: float | Tensor, label: Tensor | None = None) -> Tensor:
        check_input(self, x, label)
        return self.mean + self.log_std.exp() * x


class Correction(nn.Module):
    """An exact teacher plus a learned correction, D_teacher + c_out F: the fake network of a teacher that has
    no weights to start from. It starts as the teacher (F is 0 at first), as the papers' fake networks do."""

    def __init__(self, teacher: Any, network: nn.Module, sigma_data: float) -> None:
        super().__init__()
        self.denoiser = Denoiser(network, sigma_data)
        self._teacher = [teacher]  # in a list, so that a module's weights stay out of state_dict()
        nn.init.zeros_(network.outward.weight)  # type: ignore[union-attr, arg-type]
        nn.init.zeros_(network.outward.bias)  # type: ignore[union-attr, arg-type]

    @property
    def teacher(self) -> Any:
        return self._teacher[0]

    def learned(self, x: Tensor, sigma: float | Tensor, label: Tensor | None = None) -> Tensor:
        """The correction alone, c_out F, (n, *shape)."""
        s = _validate.broadcast_sigma(sigma, x, positive=True)
        return self.denoiser(x, sigma, label) - x * (
            self.denoiser.sigma_data**2 / (s.square() + self.denoiser.sigma_data**2)
        )

    def features(self, x: Tensor, sigma: float | Tensor, label: Tensor | None = None) -> Tensor:
        """The correction's features, as of `Denoiser`."""
        return self.denoiser.features(x, sigma, label)

    def forward(self, x: Tensor, sigma: float | Tensor, label: Tensor | None = None) -> Tensor:
        return self.teacher(x, sigma, label) + self.learned(x, sigma, label)


class Generator(nn.Module):
    """One-step student G(z, label) = D(sigma_init z, sigma_init, label): a denoiser called once, on pure noise.

    Given a teacher's denoiser it starts from the teacher's weights, as in DMD, SiD and SIM. `levels`, descending below
    sigma_init, are those at which a student of several steps is called again, each time on its last sample with new
    noise (DMD2); () for one step.
    """

    def __init__(self, denoiser: Denoiser | Affine, sigma_init: float) -> None:
        super().__init__()
        _validate.positive("sigma_init", sigma_init)
        self.denoiser, self.sigma_init = denoiser, float(sigma_init)
        self.levels: tuple[float, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.denoiser.shape

    @property
    def n_classes(self) -> int:
        return self.denoiser.n_classes

    def forward(self, z: Tensor, label: Tensor | None = None, sigma: float | None = None) -> Tensor:
        """z ~ N(0, I), (n, *shape) -> samples, (n, *shape). With sigma, z is no noise but samples noised to that level,
        to be denoised: a further step."""
        x, level = (self.sigma_init * z, self.sigma_init) if sigma is None else (z, sigma)
        return self.denoiser(x, level, label)


def check_input(model: Any, x: Tensor, label: Tensor | None) -> Tensor | None:
    """The label as int64; raise unless it and `x` fit the model's number of classes and shape."""
    if x.shape[1:] != torch.Size(model.shape):
        raise ValueError(f"x has shape {tuple(x.shape)}; wanted (n, {', '.join(map(str, model.shape))})")
    if bool(model.n_classes) != (label is not None):
        wanted = f"a class of 0 to {model.n_classes - 1} for each sample" if model.n_classes else "None"
        raise ValueError(f"label: this model has {model.n_classes} classes; wanted {wanted}")
    return None if label is None else _validate.labels("label", label, len(x), model.n_classes, wait=False)

