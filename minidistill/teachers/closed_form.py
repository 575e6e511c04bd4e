"""Teachers that need no training: the denoiser of a Gaussian fit, and that of the data set itself.

Early in the reverse process (sigma at the data's scale or above) a trained denoiser is close to the first; late in it,
the second is what an unlimited network would learn by heart. Both are D(x, sigma, label) of samples of any shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from minidistill import _validate
from minidistill._random import normal
from minidistill.data import to_float

__all__ = ["ROUNDING", "EmpiricalTeacher", "GaussianTeacher"]

ROUNDING = 1e-4  # logits' rounding errors above this are avoided by computing them in float64


class GaussianTeacher:
    """N(mu, Sigma) fitted to data: denoiser, probability flow, density and samples, all in closed form (Wang 2024).

    Args:
        data: (n, *shape), floating, or images as bytes (uint8). Sigma is the data's own, divided by n.
        labels: (n,) classes; then D(x, sigma, label) is that of the class's own Gaussian, D(x, sigma) of all data's.
    Attributes: shape; n_classes; sigma_data, the root mean variance; `mean` (*shape) and `cov` (dim, dim) of all data.
    `eigh` runs once for each Gaussian, in float64. Raises ValueError, TypeError: data or labels of the wrong kind.
    """

    def __init__(self, data: Tensor, labels: Tensor | None = None) -> None:
        n_classes, labels = _check_data(data, labels)
        groups = [data] + [data[labels == c] for c in range(n_classes)]
        moments = [_moments(group) for group in groups]
        self._build(torch.stack([m for m, _ in moments]), torch.stack([c for _, c in moments]), data)

    @classmethod
    def from_moments(cls, mean: Tensor, cov: Tensor) -> GaussianTeacher:
        """N(mean, cov) with mean (*shape) and cov (dim, dim), symmetric and positive semi-definite."""
        _validate.floats("mean", mean)
        _validate.floats("cov", cov)
        dim = mean.numel()
        if cov.shape != (dim, dim) or not torch.allclose(cov, cov.mT, rtol=1e-4):
            raise ValueError(f"cov has shape {tuple(cov.shape)}; wanted a symmetric ({dim}, {dim})")
        out = object.__new__(cls)
        out._build(mean.double().reshape(1, dim), cov.double()[None], mean[None])
        return out

    def _build(self, means: Tensor, covs: Tensor, like: Tensor) -> None:
        self.shape, self.n_classes = tuple(like.shape[1:]), len(means) - 1
        self.dtype = like.dtype if like.is_floating_point() else torch.float32
        variances, self._axes = torch.linalg.eigh(covs)  # (k, dim), (k, dim, dim), float64; row 0 is all data's
        if bool((variances < -1e-5 * variances.amax(1, keepdim=True)).any()):
            raise ValueError(f"cov has the eigenvalue {float(variances.min()):g}; wanted none below 0")
        self._means, self._variances = means, variances.clamp(min=0)

    @property
    def mean(self) -> Tensor:
        return self._means[0].reshape(self.shape).to(self.dtype)

    @property
    def cov(self) -> Tensor:
        return ((self._axes[0] * self._variances[0]) @ self._axes[0].mT).to(self.dtype)

    @property
    def sigma_data(self) -> float:
        return float(self._variances[0].mean().sqrt())

    def noised(self, sigma: float) -> GaussianTeacher:
        """The law of `x0 + sigma e`: the same axes, sigma^2 more variance along each."""
        sigma = float(_validate.positive("sigma", sigma, strictly=False))
        out = object.__new__(GaussianTeacher)
        out.__dict__.update(self.__dict__, _variances=self._variances + sigma**2)
        return out

    def __call__(self, x: Tensor, sigma: float | Tensor, label: Tensor | None = None) -> Tensor:
        """E[x0 | x] = mu + Sigma (Sigma + sigma^2 I)^-1 (x - mu), (n, *shape); sigma > 0, a float or (n,)."""
        level = _levels(self, x, sigma)
        return self._stretch(x, label, lambda variance, rows: variance / (variance + level[rows].square()))

    def flow(
        self, x: Tensor, sigma: float | Tensor, after: float | Tensor, label: Tensor | None = None
    ) -> Tensor:
        """The probability flow from level sigma > 0 to `after` >= 0 in one jump, up or down, (n, *shape): each
        principal axis is stretched by sqrt((lambda + after^2) / (lambda + sigma^2)) (Wang 2024)."""
        level, then = _levels(self, x, sigma), _levels(self, x, after, strictly=False)
        return self._stretch(x, label, lambda variance, rows: (
            (variance + then[rows].square()) / (variance + level[rows].square())).sqrt())

    def _stretch(
        self, x: Tensor, label: Tensor | None, gain: Callable[[Tensor, Tensor | slice], Tensor]
    ) -> Tensor:
        """mu + U diag(gain) U'(x - mu), for each sample with its class's mu, U and variances."""
        if not len(x):
            return x.clone()
        (flat,), out = _validate.precise(x.flatten(1)), []
        for row, rows in _groups(self, label, len(x)):
            mean, variance, axes = (t[row].to(flat) for t in (self._means, self._variances, self._axes))
            out.append(mean + ((flat[rows] - mean) @ axes * gain(variance, rows)) @ axes.mT)
        return _ungroup(out, label).reshape(x.shape).to(x.dtype)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n draws of the Gaussian of all data, (n, *shape)."""
        n = _validate.whole("n", n, least=0)
        noise = normal((n, self._means.shape[1]), self._means.device, self.dtype, generator)
        return self.mean + ((noise * self._variances[0].sqrt().to(noise)) @ self._axes[0].to(noise).mT
                            ).reshape(n, *self.shape)

    def log_prob(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        """log N(x; mu, Sigma) in nats, (n,), of all data, or of each label's class. ValueError if a Sigma that is asked
        for is singular: use `noised(sigma)` instead."""
        _check_x(self, x)
        if not len(x):
            return x.new_zeros(0)
        flat, out = x.flatten(1), []
        for row, rows in _groups(self, label, len(x)):
            if not bool((self._variances[row] > 0).all()):
                whose = f"class {row - 1}" if row else "all data"
                raise ValueError(f"log_prob: the covariance of {whose} is singular; "
                                 "wanted .noised(sigma).log_prob(x) with sigma > 0")
            mean, variance, axes = (t[row].to(x) for t in (self._means, self._variances, self._axes))
            quadratic = (((flat[rows] - mean) @ axes).square() / variance).sum(1)
            out.append(-0.5 * (quadratic + (2 * math.pi * variance).log().sum()))
        return _ungroup(out, label)


class EmpiricalTeacher:
    """The exact denoiser of the data set itself: E[x0 | x] = sum_i softmax_i(-|x - x_i|^2 / (2 sigma^2)) x_i.

    Its samples are the training data: all that a perfect learner could do. One pass over the data in chunks, with a
    running log-sum-exp, so that the data are never copied. Near sigma = 0 the exponents are differences of large
    numbers; where float32 would show, they are computed in float64.

    Args:
        data: (n, *shape), floating, or images as bytes (uint8), which are kept as bytes.
        smoothing: h > 0 averages the score over fixed perturbations of x (Scarvelis 2023, sigma-CFDM), and samples come
            to lie between data points. The paper moves z = x / (1 + sigma) by h e, so x moves by h (1 + sigma) e, and
            D(x) = mean_m D_0(x + h (1 + sigma) e_m). The e_m come in pairs +e, -e: with their mean 0 this is exact
            for the mean score, and D at sigma -> 0 is a mean of `draws` data points.
        labels: (n,) classes; with a label, the mean is over that class alone.
        top_k: only the k nearest data points (found exactly) have a weight; None for all. Below 1 % off where sigma is
            small against the data's scale; above it all points count, and k must be most of them.
        chunk: data points held as floats at once. draws: an even number of perturbations.
        generator: draws the perturbations.
    Attributes: shape, n_classes, sigma_data (root mean variance).
    Raises ValueError, TypeError: data or labels of the wrong kind, bad counts.
    """

    def __init__(
        self, data: Tensor, smoothing: float = 0.0, labels: Tensor | None = None, *, top_k: int | None = None,
        chunk: int = 2048, draws: int = 16, generator: torch.Generator | None = None,
    ) -> None:
        self.n_classes, labels = _check_data(data, labels)
        smoothing, chunk = _validate.positive("smoothing", smoothing, strictly=False), _validate.whole("chunk", chunk)
        top_k = None if top_k is None else _validate.whole("top_k", top_k)
        draws = _validate.whole("draws", draws, least=0)
        if draws < 2 or draws % 2:
            raise ValueError(f"draws={draws}: wanted an even number, 2 or more")
        self.data, self.shape, self.smoothing = data, tuple(data.shape[1:]), float(smoothing)
        self.top_k, self.chunk = top_k, chunk
        half = normal((draws // 2 if smoothing else 0, *self.shape), data.device, torch.get_default_dtype(), generator)
        self.noise = torch.cat([half, -half])  # (draws, *shape), and none without smoothing
        self._rows = [None if labels is None else (labels == c).nonzero()[:, 0] for c in range(self.n_classes)]
        # Everything is measured from the median of some points, which takes the common part out of the large numbers
        # and is not moved by a few far ones. It has the data's own digits, so that differences to it are exact.
        self._centre = self._floats(data[:: math.ceil(len(data) / 1000)], None).median(0).values.double()  # (dim,)
        totals = [(part.double() - self._centre).sum(0) for _, part in self._chunks(None, None)]
        norms = [(part.double() - self._centre).square().sum(1) for _, part in self._chunks(None, None)]
        self._norms = torch.cat(norms)  # |x_i|^2, (n,) float64
        off = (torch.stack(totals).sum(0) / len(data)).square().sum()  # of the mean
        self.sigma_data = float(((self._norms.mean() - off).clamp(min=0) / len(self._centre)).sqrt())

    def __call__(self, x: Tensor, sigma: float | Tensor, label: Tensor | None = None) -> Tensor:
        """E[x0 | x], (n, *shape): x (n, *shape), sigma > 0 a float or (n,), label (n,) or None."""
        level = _levels(self, x, sigma)
        if not len(x):
            return x.clone()
        (flat,), out = _validate.precise(x.flatten(1)), []
        flat = flat - self._centre.to(flat)
        for row, group in _groups(self, label, len(x)):
            which = self._rows[row - 1] if row else None
            out.append(self._smoothed(flat[group], level[group], which))
        return (_ungroup(out, label) + self._centre.to(flat)).reshape(x.shape).to(x.dtype)

    def _smoothed(self, x: Tensor, sigma: Tensor, which: Tensor | None) -> Tensor:
        if not self.smoothing:
            return self._mean(x, sigma, which)
        moved = (x + self.smoothing * (1 + sigma) * e for e in self.noise.to(x).flatten(1))
        return sum(self._mean(u, sigma, which) for u in moved) / len(self.noise)  # type: ignore[return-value]

    def _mean(self, x: Tensor, sigma: Tensor, which: Tensor | None) -> Tensor:
        """The posterior mean about the centre, (n, dim); `which` data points take part."""
        wide = self._wide(x, sigma)
        if self.top_k is not None:
            return self._mean_of_nearest(x, sigma, which, wide)
        best = torch.full((len(x), 1), torch.finfo(wide).min, dtype=wide, device=x.device)
        weight, total = torch.zeros_like(best, dtype=x.dtype), torch.zeros_like(x)
        for rows, part in self._chunks(which, x.dtype):
            logit = self._logits(x, sigma, part, rows, wide)  # (n, chunk)
            peak = torch.maximum(best, logit.amax(1, keepdim=True))
            w, fade = (logit - peak).exp().to(x.dtype), (best - peak).exp().to(x.dtype)
            weight, total, best = weight * fade + w.sum(1, keepdim=True), total * fade + w @ part, peak
        return total / weight

    def _mean_of_nearest(self, x: Tensor, sigma: Tensor, which: Tensor | None, wide: torch.dtype) -> Tensor:
        logits = torch.empty(len(x), 0, dtype=wide, device=x.device)
        nearest = torch.empty(len(x), 0, dtype=torch.long, device=x.device)
        for rows, part in self._chunks(which, x.dtype):
            logits = torch.cat([logits, self._logits(x, sigma, part, rows, wide)], 1)
            nearest = torch.cat([nearest, rows.expand(len(x), -1)], 1)
            logits, kept = logits.topk(min(self.top_k or 1, logits.shape[1]), dim=1)
            nearest = nearest.gather(1, kept)
        weight = logits.softmax(1).to(x.dtype)
        pairs = zip(weight, nearest, strict=True)
        return torch.stack([w @ self._floats(self.data[rows], x.dtype) for w, rows in pairs])

    def _logits(self, x: Tensor, sigma: Tensor, part: Tensor, rows: Tensor, wide: torch.dtype) -> Tensor:
        """-|x - x_i|^2 / (2 sigma^2) + |x|^2 / (2 sigma^2), (n, chunk): the part that depends on i. Where even float64
        would lose it beside |x| |x_i|, the squared distances themselves, from differences."""
        if wide == torch.float64 and self._size(x, sigma) * torch.finfo(wide).eps > ROUNDING:
            apart = torch.cdist(x.to(wide), part.to(wide), compute_mode="donot_use_mm_for_euclid_dist")
            return -(apart / sigma.to(wide)).square() / 2
        return (x.to(wide) @ part.to(wide).mT - self._norms[rows].to(wide) / 2) / sigma.to(wide).square()

    def _wide(self, x: Tensor, sigma: Tensor) -> torch.dtype:
        """x's precision if rounding |x||x_i| hardly changes the logits, else float64."""
        return torch.float64 if self._size(x, sigma) * torch.finfo(x.dtype).eps > ROUNDING else x.dtype

    def _size(self, x: Tensor, sigma: Tensor) -> float:
        """The largest |x| |x_i| / sigma^2."""
        lengths = x.detach().double().norm(dim=1) * self._norms.max().sqrt()
        return float((lengths / sigma[:, 0].double().square()).amax())

    def _chunks(self, which: Tensor | None, dtype: torch.dtype | None) -> Iterator[tuple[Tensor, Tensor]]:
        """(their numbers, the data points as floats about the centre), (chunk,) and (chunk, dim) at a time."""
        n = len(self.data) if which is None else len(which)
        for start in range(0, n, self.chunk):
            rows = torch.arange(start, min(start + self.chunk, n), device=self.data.device)
            if which is None:
                yield rows, self._floats(self.data[start : start + self.chunk], dtype)
            else:
                yield which[rows], self._floats(self.data[which[rows]], dtype)

    def _floats(self, data: Tensor, dtype: torch.dtype | None) -> Tensor:
        """(m, dim) about the centre in the dtype; with None, as they are."""
        flat = to_float(data).flatten(1)
        return flat if dtype is None else flat.to(dtype) - self._centre.to(dtype)


# ---------------------------------------------------------------------------------- what both share

def _check_data(data: Tensor, labels: Tensor | None) -> tuple[int, Tensor | None]:
    """The number of classes and the labels; an error unless data are (n, *shape), floating and finite or bytes, and the
    labels fit."""
    if not (isinstance(data, Tensor) and data.dtype == torch.uint8 and data.ndim >= 2 and len(data)):
        _validate.samples("data", data)
    if labels is None:
        return 0, None
    labels = _validate.labels("labels", labels, len(data))
    n_classes = int(labels.max()) + 1
    counts = torch.bincount(labels, minlength=n_classes)
    if not bool(counts.all()):
        missing = int(counts.argmin())
        raise ValueError(f"labels: no sample has class {missing}; wanted some of each, 0 to {n_classes - 1}")
    return n_classes, labels


def _moments(data: Tensor, chunk: int = 4096) -> tuple[Tensor, Tensor]:
    """Mean (dim,) and covariance (dim, dim) in float64, a chunk at a time."""
    parts = [data[i : i + chunk] for i in range(0, len(data), chunk)]
    mean = torch.stack([to_float(p).double().flatten(1).sum(0) for p in parts]).sum(0) / len(data)
    cov = mean.new_zeros(len(mean), len(mean))
    for part in parts:
        offset = to_float(part).double().flatten(1) - mean
        cov.addmm_(offset.mT, offset)
    return mean, cov / len(data)


def _check_x(teacher: GaussianTeacher | EmpiricalTeacher, x: Tensor) -> None:
    _validate.floats("x", x)
    if tuple(x.shape[1:]) != teacher.shape:
        raise ValueError(f"x is {x.dtype} of shape {tuple(x.shape)}; wanted floats of shape "
                         f"(n, {', '.join(map(str, teacher.shape))})")


def _levels(
    teacher: GaussianTeacher | EmpiricalTeacher, x: Tensor, sigma: float | Tensor, *, strictly: bool = True
) -> Tensor:
    """sigma, one a sample, (n, 1)."""
    _check_x(teacher, x)
    return _validate.broadcast_sigma(sigma, x, positive=strictly).reshape(-1, 1).expand(len(x), 1)


def _groups(
    teacher: GaussianTeacher | EmpiricalTeacher, label: Tensor | None, n: int
) -> Iterator[tuple[int, Tensor | slice]]:
    """(0, all samples) without labels, else (1 + class, its samples' numbers) for each class there is, in order."""
    if label is None:
        yield 0, slice(None)
        return
    if not teacher.n_classes:
        raise ValueError("label: this teacher was made without labels; wanted None")
    label = _validate.labels("label", label, n, teacher.n_classes)
    for c in label.unique():  # not tolist(), which torch before 2.11 refuses inside torch.func
        yield 1 + int(c), (label == c).nonzero()[:, 0]


def _ungroup(parts: list[Tensor], label: Tensor | None) -> Tensor:
    """The groups' results, put back into the samples' order."""
    if label is None:
        return parts[0]
    order = label.long().argsort(stable=True)  # the order in which the groups hold the samples
    return torch.cat(parts)[order.argsort()]
