"""What turns images into the features that Frechet distances, precision and recall compare.

Three of the four extractors work offline: the digits' classifier trains in a second, the one for CIFAR-10 is stored in
the package, and a convolutional network with random weights needs no training. Inception's weights are a download of
91 MB, made only where that is allowed.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from tqdm.auto import tqdm

from minidistill import _validate, data, training
from minidistill.metrics import classifier

__all__ = [
    "EXTRACTORS", "INCEPTION_FILE", "INCEPTION_URL", "Extractor", "clipped", "enlarged", "extractor", "to_uint8",
    "unchanged",
]

#: FID's Inception in PyTorch's format; it is kept in the folder `checkpoints` of torch's hub directory, as
#: torch-fidelity does. The name ends with the start of its SHA-256.
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"


def clipped(images: Tensor) -> Tensor:
    """Floats held to [-1, 1], as a screen would show them."""
    return images.clamp(-1, 1)


def to_uint8(images: Tensor) -> Tensor:
    """Floats in [-1, 1] to the nearest of the 256 levels, values beyond to the nearest end (EDM's rounding)."""
    return (images * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def enlarged(images: Tensor) -> Tensor:
    """Smaller images, clipped, at the 32x32 pixels that the CIFAR-10 classifier was made for."""
    return interpolate(clipped(images), (32, 32), mode="bicubic", align_corners=False).clamp(-1, 1)


def unchanged(images: Tensor) -> Tensor:
    return images


@dataclass
class Extractor:
    """Features of images, computed in batches on one device.

    `network` maps a batch that `prepare` made to features (n, dim); `judge` is the classifier that the features belong
    to, where there is one; `shape` is that of one image, None standing for any size.
    """

    name: str
    dim: int
    network: Callable[[Tensor], Tensor]
    shape: tuple[int | None, ...]
    prepare: Callable[[Tensor], Tensor] = clipped
    judge: classifier.Classifier | None = None
    batch_size: int = 500
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        self.dim = _validate.whole("dim", self.dim)
        self.batch_size = _validate.whole("batch_size", self.batch_size)

    def __call__(self, images: Tensor, *, progress: bool = False) -> Tensor:
        """Features (n, dim), float32 on the CPU, of images (n, c, h, w): floats in [-1, 1] or uint8.

        Raises ValueError for images of another shape or with NaNs, or if the network's features are not (n, dim).
        """
        out = torch.cat(self._batches(self.network, images, progress)).float()
        if out.shape != (len(images), self.dim):
            wanted = (len(images), self.dim)
            raise ValueError(f"{self.name}'s features have shape {tuple(out.shape)}; wanted {wanted}")
        return out

    def recognised(self, images: Tensor, label: Tensor) -> float | None:
        """The fraction of images classified as their label (n,); None if no classifier is behind the features."""
        label = _validate.labels("label", label, len(images))
        if self.judge is None:
            return None
        guess = torch.cat(self._batches(self.judge, images)).argmax(1)
        return float((guess == label.cpu()).double().mean())

    def check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise ValueError unless images of `shape` fit."""
        if len(shape) != len(self.shape) or any(
            wanted not in (None, given) for wanted, given in zip(self.shape, shape, strict=True)
        ):
            wanted = ", ".join("any" if size is None else str(size) for size in self.shape)
            raise ValueError(f"{name} has images of shape {tuple(shape)}; {self.name} wants ({wanted})")

    @torch.no_grad()
    def _batches(self, function: Callable[[Tensor], Tensor], images: Tensor, progress: bool = False) -> list[Tensor]:
        if not isinstance(images, Tensor) or images.dtype != torch.uint8:
            _validate.samples("images", images)
        self.check_shape("images", tuple(images.shape[1:]))
        batches = tqdm(images.split(self.batch_size), disable=not progress, desc=f"features: {self.name}",
                       **training.bar_options)
        return [function(self.prepare(data.to_float(batch).to(self.device))).cpu() for batch in batches]


def extractor(
    name: str, *, batch_size: int = 500, device: torch.device | str = "cpu", seed: int = 0,
    weights: str | Path | None = None, allow_download: bool = False, size: int | None = None,
) -> Extractor:
    """An extractor by name.

    Args:
        name: "cifar10_classifier", 128 features of 3x32x32 images, stored in the package (`classifier.load_cifar10`);
            "digits_classifier", 32 features of 1x8x8 images, trained here and now on the digits;
            "random_conv", 128 features of colour images of 8x8 pixels or more: a convolutional network with random
            weights, which knows no classes and looks at colours and textures;
            "inception", the 2,048 features of FID (Heusel 2017) of colour images of any size, through torch-fidelity,
            which needs `minidistill[fid]`.
        batch_size: images a batch.
        device: where the network runs; features come back on the CPU.
        seed: of the digits' classifier, and of the random weights.
        weights: a file with Inception's weights; default: where torch-fidelity keeps its download.
        allow_download: download Inception's weights (91 MB) if they are not there.
        size: the side of the images that "cifar10_classifier" will be given, if it is not 32: they are enlarged
            bicubically before it looks at them (it recognises 61% of 16x16 test images then; of blurrier ones fewer).
    Raises:
        ValueError: an unknown name, or a size that this extractor does not take.
        ImportError: "inception" without torch-fidelity.
        OSError: "inception" without its weights, or with a file that is something else.
    """
    build = _validate.choose("features", name, EXTRACTORS)
    _validate.whole("batch_size", batch_size)
    if size is not None:
        _validate.whole("size", size)
        if name != "cifar10_classifier":
            raise ValueError(f"size={size}: {name} takes images as they are; wanted None")
    return build(device=device, batch_size=batch_size, seed=seed, weights=weights, allow_download=allow_download,
                 size=size)


def _of_classifier(name: str, model: classifier.Classifier, shape: tuple[int, ...], prepare: Callable[[Tensor], Tensor],
                   batch_size: int, device: torch.device | str) -> Extractor:
    model = model.to(device)
    dim = int(model.head.in_features)  # type: ignore[arg-type]
    return Extractor(name, dim, model.features, shape, prepare, model, batch_size, device)


def _cifar10_classifier(*, device: torch.device | str, batch_size: int, size: int | None, **_: Any) -> Extractor:
    model = classifier.load_cifar10()
    if size in (None, 32):
        return _of_classifier("cifar10_classifier", model, (3, 32, 32), clipped, batch_size, device)
    name = f"cifar10_classifier of {size}x{size}"
    return _of_classifier(name, model, (3, size, size), enlarged, batch_size, device)


def _random_conv(*, device: torch.device | str, batch_size: int, seed: int, **_: Any) -> Extractor:
    """Weights of a variance that keeps the size of the activations (He 2015), drawn from a generator of their own."""
    with torch.random.fork_rng(devices=[]):  # its first weights are thrown away, and cost the caller no random number
        model = classifier.ConvClassifier((3, 32, 32), stages=((64,), (128,), (128,)))
    rng = training.generator_on("cpu", seed)
    for layer in model.body.children():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=rng)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    model = model.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Extractor("random_conv", 128, model.features, (3, None, None), clipped, None, batch_size, device)


def _digits_classifier(*, device: torch.device | str, batch_size: int, seed: int, **_: Any) -> Extractor:
    images, labels = data.digits()
    model = classifier.train_classifier(images, labels, seed=seed, progress=False)
    # Not clipped: these numbers are the quickstart's.
    return _of_classifier("digits_classifier", model, (1, 8, 8), unchanged, batch_size, device)


def _inception(
    *, device: torch.device | str, batch_size: int, weights: str | Path | None, allow_download: bool, **_: Any
) -> Extractor:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ImportError(
            "features='inception' needs torch-fidelity: pip install 'minidistill[fid]' (it brings torchvision). "
            "Offline there are 'cifar10_classifier' and 'digits_classifier'"
        ) from error
    network: nn.Module = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(_inception_weights(weights, allow_download))
    )
    network = network.to(device).eval()

    def features(images: Tensor) -> Tensor:
        return network(images)[0]  # a tuple, one entry for each layer asked for

    return Extractor("inception", 2048, features, (3, None, None), to_uint8, None, batch_size, device)


def _inception_weights(weights: str | Path | None, allow_download: bool) -> Path:
    """The file with Inception's weights, downloaded if it may be; OSError if it is not there or no such file."""
    usual = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    path = usual if weights is None else _validate.path("weights", weights)
    if not path.is_file():
        if weights is not None or not allow_download:
            raise FileNotFoundError(
                f"{path}: no such file, and features='inception' needs its weights: allow the download (91 MB), "
                f"or put there {INCEPTION_URL}"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(INCEPTION_URL, str(path), hash_prefix=INCEPTION_FILE[-12:-4])
    try:  # torch-fidelity unpickles whatever the file holds; this loads tensors only, and refuses the rest
        torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        kind = type(error).__name__
        raise OSError(f"{path} does not hold Inception's weights ({kind}); see {INCEPTION_URL}") from error
    return path


EXTRACTORS: dict[str, Callable[..., Extractor]] = {
    "cifar10_classifier": _cifar10_classifier, "digits_classifier": _digits_classifier, "inception": _inception,
    "random_conv": _random_conv,
}
