"""Files: safetensors written atomically, read with their checksum verified. Nothing is ever unpickled."""

from __future__ import annotations

import json
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from minidistill import _validate
from minidistill.networks import MLP, Denoiser, Generator
from minidistill.unet import UNet

#: The networks that a checkpoint may name in its header.
NETWORKS: dict[str, Callable[..., nn.Module]] = {"mlp": MLP, "unet": UNet}


def writable(path: str | Path) -> Path:
    """The path, its folder made; OSError now if a file can't be written there, not after an hour's training."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; wanted a file's name")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent):
        pass
    return path


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A temporary name beside `path`, moved onto it when the block ends well and removed when it does not:
    readers see the old file or the new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{path.name}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write(path: str | Path, tensors: Mapping[str, Tensor], info: dict[str, str]) -> None:
    """Tensors and text in one safetensors file, with a checksum of the tensors in its header."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    data = save(tensors, metadata={**info, "crc32": str(_checksum(tensors, info))})
    with atomic(path) as name, open(name, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def read(path: str | Path, kind: str | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, text) of a file that `write` made.

    Raises FileNotFoundError, or ValueError for a file that is truncated, corrupt, not ours or of another kind.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        data = Path(path).read_bytes()  # once: another process may replace the file at any time
        tensors = load(data)
        # The format: eight bytes of the header's length, then the header, which is JSON.
        info = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error})") from error
    if "crc32" not in info or "kind" not in info:
        raise ValueError(f"{path} was not written by minidistill")
    if str(_checksum(tensors, {key: value for key, value in info.items() if key != "crc32"})) != info["crc32"]:
        raise ValueError(f"{path} is corrupt: its checksum does not match")
    if kind is not None and info["kind"] != kind:
        raise ValueError(f"{path} holds a {info['kind']}; wanted a {kind}")
    return tensors, info


def _checksum(tensors: Mapping[str, Tensor], info: Mapping[str, str]) -> int:
    total = zlib.crc32(json.dumps(dict(info), sort_keys=True).encode())
    for name in sorted(tensors):
        total = zlib.crc32(name.encode(), total)
        total = zlib.crc32(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(), total)
    return total


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose name starts with the prefix, without it."""
    return {name[len(prefix):]: value for name, value in tensors.items() if name.startswith(prefix)}


def check_weights(path: str | Path, name: str, weights: Mapping[str, Tensor], module: nn.Module) -> None:
    """Raise ValueError unless `weights` have just the names and shapes of the module's own."""
    own = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    given = {key: tuple(value.shape) for key, value in weights.items()}
    for key in sorted({*own, *given}):
        if own.get(key) != given.get(key):
            raise ValueError(
                f"{path} is of another architecture: {name}.{key} has shape {given.get(key, 'none')} there; "
                f"wanted {own.get(key, 'none')}"
            )


def save_model(path: str | Path, model: Denoiser | Generator, **info: Any) -> None:
    """A denoiser or generator to one file that says how to build it; `info` is kept beside it as JSON."""
    denoiser = model.denoiser if isinstance(model, Generator) else model
    recipe = {"network": denoiser.network.config, "sigma_data": denoiser.sigma_data, "info": info}
    kind = "generator" if isinstance(model, Generator) else "denoiser"
    if isinstance(model, Generator):
        recipe["sigma_init"] = model.sigma_init
    write(writable(path), denoiser.network.state_dict(), {"kind": kind, "recipe": json.dumps(recipe)})


def load_model(path: str | Path) -> tuple[Denoiser | Generator, dict[str, Any]]:
    """(model in eval mode, its info) from a file that `save_model` wrote; errors as `read`'s."""
    weights, info = read(path)
    if info["kind"] not in ("denoiser", "generator"):
        raise ValueError(f"{path} holds a {info['kind']}; wanted a denoiser or a generator")
    recipe = json.loads(info["recipe"])
    config = dict(recipe["network"])
    build = _validate.choose("network kind", config.pop("kind"), NETWORKS)
    network = build(**{**config, "shape": tuple(config["shape"])})
    check_weights(path, "network", weights, network)
    network.load_state_dict(weights)
    denoiser = Denoiser(network, recipe["sigma_data"])
    model = Generator(denoiser, recipe["sigma_init"]) if info["kind"] == "generator" else denoiser
    return model.eval(), recipe["info"]
