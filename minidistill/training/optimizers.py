"""What one update does: gradients, clipping, skipping, learning rates, the average of the weights, speed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from minidistill import _validate
from minidistill.networks import Denoiser

__all__ = [
    "Speed", "backward", "descend", "generator_on", "optimizer_step", "schedule", "set_learning_rate", "update_ema",
]


def optimizer_step(loss: Tensor, optimizer: torch.optim.Optimizer, clip: float | None = None) -> Tensor:
    """Backward pass of a scalar loss and one update of the optimizer's parameters; see `descend`."""
    backward(loss, optimizer)
    return descend(optimizer, clip)


def backward(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Add the loss's gradient to the optimizer's parameters, and to nothing else: a generator's loss passes through
    the fake network and leaves it alone."""
    torch.autograd.backward(loss, inputs=_parameters(optimizer))


@torch.no_grad()
def descend(optimizer: torch.optim.Optimizer, clip: float | None = None) -> Tensor:
    """One update with the gradients gathered by `backward`, their norm clipped; none if that norm is not finite.

    Returns 1.0 if the update was skipped and 0.0 if not, on the parameters' device: nobody has to wait for it.
    """
    parameters = _parameters(optimizer)
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm(grads)
    bad = (~norm.isfinite()).float()
    if clip is not None:
        nn.utils.clip_grads_with_norm_(parameters, clip, norm)
    if optimizer.defaults.get("fused") and bad.device.type != "cpu":
        optimizer.found_inf = bad  # type: ignore[attr-defined]  # the fused kernel reads it, as for GradScaler
        optimizer.step()
    elif not bad:
        optimizer.step()
    optimizer.zero_grad()
    return bad


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


@dataclass(frozen=True)
class Speed:
    """How to run a network fast; what it computes stays the same up to rounding.

    precision: "bfloat16" for automatic mixed precision (weights, losses and optimizers stay in float32).
    channels_last: the memory order that convolutions prefer on GPUs.
    compile: True for `torch.compile`; "cuda_graphs" for its mode that also records CUDA graphs.
    """

    precision: str = "float32"
    channels_last: bool = False
    compile: bool | str = False

    def apply(self, denoiser: nn.Module, average: nn.Module | None = None) -> None:
        """Change a `Denoiser` (or `Generator`) in place; its average gets the same memory order, so that the two are
        averaged in one kernel, and nothing else. Raises ValueError for an unknown setting."""
        dtypes = {"float32": None, "bfloat16": torch.bfloat16}
        modes: dict[Any, str | None] = {False: None, True: "default", "cuda_graphs": "reduce-overhead"}
        autocast = _validate.choose("precision", self.precision, dtypes)
        if self.compile not in modes:
            raise ValueError(f"compile={self.compile!r}: wanted False, True or 'cuda_graphs'")
        for each in (denoiser, average):
            if each is not None and self.channels_last:
                each.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for module in denoiser.modules():
            if isinstance(module, Denoiser):
                module.autocast = autocast
                if mode := modes[self.compile]:
                    module.network.compile(mode=mode)


def schedule(step: int, steps: int, warmup: int = 0, hold: float = 0.2) -> float:
    """The learning rate's factor: a linear warm-up, 1 until `hold` of the run, then linearly to 0 (hold = 1: never)."""
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    return rise * min(1.0, (1 - step / steps) / (1 - hold)) if hold < 1 else rise


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, halflife: float, batch_size: int, step: int) -> None:
    """ema <- model + decay (ema - model), the past's weight halving every `halflife` samples seen; the
    half-life is at most a twentieth of what was seen so far (Karras 2022, appendix F.1), so the start fades.

    Of two networks of one architecture. Buffers are averaged like weights, such as the running statistics of a batch
    normalisation, which belong to the weights; those of whole numbers are copied.
    """
    halflife = min(halflife, 0.05 * (step + 1) * batch_size)
    decay = 0.5 ** (batch_size / max(halflife, 1e-8))
    pairs = zip([*ema.parameters(), *ema.buffers()], [*model.parameters(), *model.buffers()], strict=True)
    smooth: tuple[list[Tensor], list[Tensor]] = ([], [])
    for average, value in pairs:
        if average.is_floating_point() or average.is_complex():
            smooth[0].append(average)
            smooth[1].append(value)
        else:
            average.copy_(value)
    get_ema_multi_avg_fn(decay)(*smooth, step)


def generator_on(device: torch.device | str, seed: int) -> torch.Generator:
    """A random generator on the device, seeded."""
    _validate.seed("seed", seed)
    return torch.Generator(device).manual_seed(seed)

