"""Teachers from diffusers: a pixel-space `UNet2DModel` and its noise table, as D(x, sigma, label).

Such models were trained on x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) e at whole times t (Ho 2020, equation 4). Divided
by sqrt(abar_t) that is x = x0 + sigma_t e with sigma_t = sqrt((1 - abar_t) / abar_t) (Song 2021, DDIM, section 4.3);
Karras 2022 (appendix C) runs them so. Between two entries of the table t is linear in log sigma, as in k-diffusion.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minidistill import _validate
from minidistill.networks import check_input
from minidistill.processes import TO_X0

__all__ = ["PREDICTIONS", "DiffusersDenoiser", "from_diffusers"]

#: What diffusers calls the three predictions, and what `conversions.py` does.
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


class DiffusersDenoiser(nn.Module):
    """D(x, sigma, label) of a diffusers `UNet2DModel`, in EDM coordinates.

    Args:
        unet: takes x_t (n, c, h, w), t (n,) and class_labels; a learned variance, the second half of twice as many
            channels, is dropped.
        alphas_cumprod: abar_t for t = 0, 1, ...: (steps,), falling, between 1 and 0. An abar of 0 (zero terminal SNR)
            is left out: its sigma is infinite.
        prediction: "epsilon", "v_prediction" or "sample", what the model was trained to answer with.
        clip: clip x0 to [-1, 1], as pipelines with clip_sample do. It stops gradients where it clips.
        sigma_data: the data's standard deviation, for whoever builds on this teacher; D does not use it.
    Attributes:
        shape: (c, h, w). n_classes: 0 for an unconditional model. sigmas: the table, (steps,), rising, float64.
    """

    sigmas: Tensor

    def __init__(
        self, unet: nn.Module, alphas_cumprod: Tensor, prediction: str = "epsilon", *, clip: bool = False,
        sigma_data: float = 0.5,
    ) -> None:
        super().__init__()
        sigma_data = _validate.positive("sigma_data", sigma_data)
        self.prediction = _validate.choose("prediction", prediction, PREDICTIONS)
        self.shape, self.n_classes, self.whole_times = _interface(unet)
        self.unet, self.clip, self.sigma_data = unet, bool(clip), float(sigma_data)
        abar = _validate.tensor("alphas_cumprod", alphas_cumprod).detach().double()
        abar = abar[abar > 0]
        sigmas = ((1 - abar) / abar).sqrt()
        if sigmas.ndim != 1 or len(sigmas) < 2 or not bool((sigmas > 0).all() and (sigmas.diff() > 0).all()):
            raise ValueError("alphas_cumprod: wanted two numbers or more that fall from below 1 towards 0, one a time")
        self.register_buffer("sigmas", sigmas, persistent=False)

    @property
    def sigma_min(self) -> float:
        return float(self.sigmas[0])

    @property
    def sigma_max(self) -> float:
        return float(self.sigmas[-1])

    def time(self, sigma: Tensor) -> Tensor:
        """The table's (continuous) time of each sigma, same shape, float64: linear in log sigma between two entries, a
        whole number at an entry (up to float32's rounding), and the first or last time outside the table."""
        table = self.sigmas.double().log()
        wanted = sigma.double().log().clamp(table[0], table[-1]).contiguous()
        low = (torch.searchsorted(table, wanted, right=True) - 1).clamp(0, len(table) - 2)
        t = low + (wanted - table[low]) / (table[low + 1] - table[low])
        return torch.where((t - t.round()).abs() < 1e-4, t.round(), t)

    def forward(self, x: Tensor, sigma: float | Tensor, label: Tensor | None = None) -> Tensor:
        """E[x0 | x] as the model has it: x (n, c, h, w), sigma a float or (n,) > 0, label (n,) if class-conditional.
        Outside the table the model gets the nearest time, and x scaled by the true sigma."""
        label = check_input(self, x, label)
        level = _validate.broadcast_sigma(sigma, x, positive=True).double()  # sigma^2 leaves half precision's range
        t = self.time(level).flatten().expand(len(x))
        t = t.round().long() if self.whole_times else t.float()
        alpha = torch.rsqrt(1 + level.square())  # sqrt(abar)
        noise = (level * alpha).to(x.dtype)  # sqrt(1 - abar)
        alpha = alpha.to(x.dtype)
        model_input = alpha * x
        weights = next(self.unet.parameters())
        out = self.unet(model_input.to(weights.dtype), t, class_labels=label, return_dict=False)[0]
        x0 = TO_X0[self.prediction](model_input, out[:, : self.shape[0]].to(x.dtype), alpha, noise)
        return x0.clamp(-1, 1) if self.clip else x0


def from_diffusers(
    model_or_path: Any, *, scheduler: Any = None, revision: str | None = None, clip: bool = False,
    sigma_data: float = 0.5, **options: Any,
) -> DiffusersDenoiser:
    """A diffusers model as a teacher, in eval mode.

    Args:
        model_or_path: a `UNet2DModel`; a pipeline of one (`DDPMPipeline`, `DDIMPipeline`); the folder of a saved
            pipeline or model; or the hub's id of a pipeline, "owner/name". Weights are read from safetensors files
            only, so that nothing is unpickled.
        scheduler: whose noise table and prediction type count: a diffusers scheduler, or the folder of a saved one.
            None for the pipeline's own; a model that has none gets `DDPMScheduler()`, Ho 2020's: 1000 times, beta
            linear from 1e-4 to 0.02, epsilon.
        revision: the hub's branch, tag or commit.
        clip, sigma_data: as in `DiffusersDenoiser`.
        options: go on to diffusers' `from_pretrained`, such as cache_dir or local_files_only.
    Raises:
        ImportError: diffusers is missing. TypeError: not a model, pipeline or path. FileNotFoundError: no such folder,
        or no safetensors in it. ValueError: a model or scheduler of another kind, such as flow matching's.
    """
    diffusers = _diffusers()
    if isinstance(model_or_path, (str, Path)):
        unet, own = _load(model_or_path, revision, options)
    elif revision is not None or options:
        name = "revision" if revision is not None else next(iter(options))
        raise ValueError(f"{name}={revision or options[name]!r}: wanted only with a path; a model was given")
    else:
        unet, own = getattr(model_or_path, "unet", model_or_path), getattr(model_or_path, "scheduler", None)
    if not isinstance(unet, diffusers.UNet2DModel):
        given = type(unet).__name__
        raise TypeError(f"model_or_path is or holds a {given}; wanted a UNet2DModel, a pipeline of one, or a path")
    if isinstance(scheduler, (str, Path)):
        scheduler = _validate.path("scheduler", scheduler)
        if not (scheduler / "scheduler_config.json").is_file():
            raise FileNotFoundError(f"scheduler={str(scheduler)!r}: no folder with a scheduler_config.json")
        scheduler = diffusers.DDPMScheduler.from_pretrained(scheduler)
    if scheduler is None:
        scheduler = diffusers.DDPMScheduler() if own is None else own
    table = getattr(scheduler, "alphas_cumprod", None)
    if table is None:
        given = type(scheduler).__name__
        raise ValueError(f"scheduler is a {given}; wanted one with alphas_cumprod, such as DDPMScheduler")
    prediction = getattr(scheduler.config, "prediction_type", "epsilon")
    return DiffusersDenoiser(unet, table, prediction, clip=clip, sigma_data=sigma_data).eval()


def _load(name: str | Path, revision: str | None, options: dict[str, Any]) -> tuple[nn.Module, Any]:
    """(model, scheduler or None) of a folder, or of the hub's pipeline."""
    diffusers, path = _diffusers(), _validate.path("model_or_path", name)
    options = {"use_safetensors": True, "low_cpu_mem_usage": False, **options}  # the second needs accelerate
    if not options["use_safetensors"]:
        raise ValueError("use_safetensors=False: wanted True, because other files are unpickled")
    if path.is_dir():
        if revision is not None:
            raise ValueError(f"revision={revision!r}: {path} is a folder; wanted None")
        weights = path / "unet" if (path / "unet").is_dir() else path
        if not any(weights.glob("*.safetensors")):
            found = ", ".join(sorted(file.name for file in weights.glob("*.bin"))) or "no weights"
            raise FileNotFoundError(f"{weights} holds {found}; wanted .safetensors, which need no unpickling")
        if not (path / "model_index.json").is_file():
            return diffusers.UNet2DModel.from_pretrained(path, **options), None
    elif isinstance(name, Path) or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        raise FileNotFoundError(f"{path}: no such folder, and no hub id such as 'google/ddpm-cifar10-32'")
    pipeline = diffusers.DDPMPipeline.from_pretrained(path if path.is_dir() else name, revision=revision, **options)
    return pipeline.unet, pipeline.scheduler


def _interface(unet: Any) -> tuple[tuple[int, int, int], int, bool]:
    """(shape, n_classes, whether its times are whole) of a model; ValueError for what D(x, sigma, label) can't say."""
    config = unet.config
    channels, side = config.in_channels, config.sample_size
    if side is None:
        raise ValueError("unet: its sample_size is None; wanted h or (h, w)")
    if config.out_channels not in (channels, 2 * channels):
        raise ValueError(f"unet: {config.out_channels} channels out, {channels} in; wanted as many, or twice as many")
    if config.time_embedding_type not in ("positional", "learned"):
        raise ValueError(f"unet: time_embedding_type={config.time_embedding_type!r}; wanted 'positional' or 'learned'")
    if config.class_embed_type is not None:
        raise ValueError(f"unet: class_embed_type={config.class_embed_type!r}; wanted None")
    height, width = (side, side) if isinstance(side, int) else side
    return (channels, height, width), config.num_class_embeds or 0, config.time_embedding_type == "learned"


def _diffusers() -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise ImportError("from_diffusers needs diffusers: pip install 'minidistill[diffusers]'") from error
    return diffusers
