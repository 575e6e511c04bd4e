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
from minidistill._autodiff import in_forward_mode
from minidistill.networks.jumps import ROUTES, jump

__all__ = ["Affine", "Correction", "Denoiser", "Generator", "Preconditioned", "check_input", "reserve_null_class"]


class Preconditioned(nn.Module):
    """A network F(x, c_noise, label) for noised data of standard deviation sigma_data, whose subclass scales what goes
    into the network and what comes out, so that both are of unit variance."""

    def __init__(self, network: nn.Module, sigma_data: float) -> None:
        super().__init__()
        self.network, self.sigma_data = network, float(_validate.positive("sigma_data", sigma_data))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.network.shape  # type: ignore[return-value]

    @property
    def n_classes(self) -> int:
        """How many classes there are to draw from and to measure; the null class is none of them."""
        return self.network.n_classes  # type: ignore[return-value]

    @property
    def null_class(self) -> int | None:
        """The label that stands for "no class told", if the network was trained with one: the one after the last."""
        return getattr(self.network, "null_class", None)

    def run(self, x: Tensor, c_noise: Tensor, label: Tensor | None, *told: Tensor) -> Tensor:
        """The network, whatever x's number format: it computes in that of its weights."""
        own = next((weight.dtype for weight in self.network.parameters()), x.dtype)
        return self.network(x.to(own), c_noise.to(own), label, *(each.to(own) for each in told))

    def told(self, to: float | Tensor | None, sigma: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        """What a network that jumps is told besides: the angle of the level `to` (None: sigma's), (n,)."""
        if getattr(self.network, "where_to", None) is None:
            return ()
        level = sigma if to is None else _validate.broadcast_sigma(to, x, name="to")
        return ((level / self.sigma_data).atan().flatten().expand(len(x)),)


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

    def forward(
        self, x: Tensor, sigma: float | Tensor, label: Tensor | None = None, to: float | Tensor | None = None
    ) -> Tensor:
        """E[x0 | x] estimated, in x's dtype: x (n, *shape), sigma a float or (n,) > 0, label (n,) if class-conditional
        (None for the null class, where there is one). Of a network that jumps, the aim of a jump to level `to`."""
        label = check_input(self, x, label)
        s = _validate.broadcast_sigma(sigma, x, positive=True)
        scale = torch.rsqrt(s.square() + self.sigma_data**2)  # c_in
        c_skip = (self.sigma_data * scale).square()
        c_out = s * self.sigma_data * scale
        c_noise, told = (s.log() / 4).flatten().expand(len(x)), self.told(to, s, x)
        if self.autocast is None or in_forward_mode():
            return (c_skip * x + c_out * self.run(scale * x, c_noise, label, *told).to(c_out.dtype)).to(x.dtype)
        with torch.autocast(x.device.type, self.autocast):
            out = self.run(scale * x, c_noise, label, *told)
        return (c_skip * x + c_out * out.to(c_out.dtype)).to(x.dtype)

    def features(self, x: Tensor, sigma: float | Tensor, label: Tensor | None = None) -> Tensor:
        """The network's features for the same input: an MLP's last hidden layer (n, c), a U-Net's bottleneck
        (n, c, h, w)."""
        label = check_input(self, x, label)
        s = _validate.broadcast_sigma(sigma, x, positive=True)
        scale = torch.rsqrt(s.square() + self.sigma_data**2)
        c_noise = (s.log() / 4).flatten().expand(len(x))
        with torch.autocast(x.device.type, self.autocast, enabled=self.autocast is not None):
            own = next((weight.dtype for weight in self.network.parameters()), x.dtype)
            told = (each.to(own) for each in self.told(None, s, x))
            features = self.network.features((scale * x).to(own), c_noise.to(own), label, *told)  # type: ignore
            return features.to(x.dtype)


class Affine(nn.Module):
    """D(x) = mean + std x, each coordinate with its own: as a generator (`Generator(Affine(...), 1.0)`) one Gaussian
    with axes along the coordinates, a student that is too small for most teachers. The noise level is not looked at."""

    n_classes = 0

    def __init__(self, shape: tuple[int, ...], mean: float = 0.0, std: float = 1.0, sigma_data: float = 1.0) -> None:
        super().__init__()
        mean, std = _validate.number("mean", mean), _validate.positive("std", std)
        self.shape = shape = _validate.shape("shape", shape)
        self.sigma_data = float(_validate.positive("sigma_data", sigma_data))
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
    noise (DMD2); () for one step. `route` says what else it can be asked, one of `jumps.ROUTES`.
    """

    def __init__(self, denoiser: Denoiser | Affine, sigma_init: float) -> None:
        super().__init__()
        self.denoiser, self.sigma_init = denoiser, float(_validate.positive("sigma_init", sigma_init))
        self.levels: tuple[float, ...] = ()
        self.route = "call"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.denoiser.shape

    @property
    def n_classes(self) -> int:
        return self.denoiser.n_classes

    def forward(
        self, z: Tensor, label: Tensor | None = None, sigma: float | Tensor | None = None,
        to: float | Tensor | None = None, aim: bool = False,
    ) -> Tensor:
        """z ~ N(0, I), (n, *shape) -> samples, (n, *shape). With sigma, z is no noise but samples noised to that level,
        to be denoised: a further step. With `to`, J(z, sigma, to): where a jump lands, or, if `aim`, its aim."""
        x, level = (self.sigma_init * z, self.sigma_init) if sigma is None else (z, sigma)
        if self.route == "jump":
            to = 0.0 if to is None else to
            return self.denoiser(x, level, label, to) if aim else jump(self.denoiser, x, level, to, label)
        if to is None or aim:
            return self.denoiser(x, level, label)
        if not ROUTES[self.route] and not (isinstance(to, float) and to == 0):
            raise ValueError(f"to={to}: this student ({self.route!r}) only knows where paths end; wanted 0")
        return jump(lambda *at: self.denoiser(*at[:3]), x, level, to, label)


def check_input(model: Any, x: Tensor, label: Tensor | None) -> Tensor | None:
    """The label as int64, which is the null class for None where the model has one. An error unless `x` and `label` fit
    the model's shape and classes; on an accelerator the label's values are not looked at."""
    _validate.floats("x", x)
    if x.shape[1:] != torch.Size(model.shape):
        raise ValueError(f"x has shape {tuple(x.shape)}; wanted (n, {', '.join(map(str, model.shape))})")
    null = getattr(model, "null_class", None)
    if label is None and null is not None:
        return torch.full((len(x),), null, device=x.device)
    if bool(model.n_classes) != (label is not None):
        wanted = f"a class of 0 to {model.n_classes - 1} for each sample" if model.n_classes else "None"
        raise ValueError(f"label: this model has {model.n_classes} classes; wanted {wanted}")
    if label is None:
        return None
    return _validate.labels("label", label, len(x), model.n_classes + (null is not None), wait=False)


def reserve_null_class(network: nn.Module) -> None:
    """Take the last of the network's classes for the null class: it then has one class fewer to draw and to measure.
    Its `config`, if it has one, says so too, and with it a file that the network is saved to."""
    classes = int(network.n_classes) - 1  # type: ignore[arg-type]
    network.n_classes, network.null_class = classes, classes  # type: ignore[assignment]
    if isinstance(getattr(network, "config", None), dict):
        network.config |= {"n_classes": classes, "null_class": True}  # type: ignore[operator]
