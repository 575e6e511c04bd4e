"""Files: safetensors written atomically, read with their checksum verified. Nothing is ever unpickled."""

from __future__ import annotations

import glob
import json
import os
import re
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
from minidistill.networks.unet import UNet

__all__ = [
    "HEADER", "NETWORKS", "atomic", "check_weights", "exists", "load_model", "part", "read", "save_model", "writable",
    "write",
]

HEADER = 100_000  # bytes left for a part's header
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


def write(
    path: str | Path, tensors: Mapping[str, Tensor], info: dict[str, str], *, limit: int | None = None
) -> list[Path]:
    """Tensors and text in one safetensors file, with a checksum of the tensors in its header.

    With `limit`, what is larger than so many bytes goes to several files, NAME-1-of-3.safetensors and so on, which
    `read` takes for one. Returns the files written. Raises ValueError for a single tensor above the limit.
    """
    path = Path(path)
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    whole = {**info, "crc32": str(_checksum(tensors, info))}
    groups = _groups(tensors, limit)
    names = [path] if len(groups) == 1 else [_part(path, k, len(groups)) for k in range(1, len(groups) + 1)]
    for name, group in zip(names, groups, strict=True):
        with atomic(name) as partial, open(partial, "wb") as file:
            file.write(save({key: tensors[key] for key in group}, metadata=whole))
            file.flush()
            os.fsync(file.fileno())
    for old in {path, *_parts(path)} - set(names):  # of an earlier writing
        old.unlink(missing_ok=True)
    return names


def read(path: str | Path, kind: str | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, text) of what `write` made, in one file or several.

    Raises FileNotFoundError, or ValueError for a file that is truncated, corrupt, not ours or of another kind.
    """
    path = Path(path)
    names = [path] if path.is_file() else _parts(path)
    if not names:
        raise FileNotFoundError(f"{path}: no such file")
    if names != [path] and names != [_part(path, k, len(names)) for k in range(1, len(names) + 1)]:
        raise ValueError(f"{path} is incomplete: only {', '.join(name.name for name in names)} are there")
    tensors: dict[str, Tensor] = {}
    for name in names:
        try:
            data = name.read_bytes()  # once: another process may replace the file at any time
            tensors |= load(data)
            # The format: eight bytes of the header's length, then the header, which is JSON.
            info = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
        except SafetensorError as error:
            raise ValueError(f"{name} is truncated or not a safetensors file ({error})") from error
    if "crc32" not in info or "kind" not in info:
        raise ValueError(f"{path} was not written by minidistill")
    if str(_checksum(tensors, {key: value for key, value in info.items() if key != "crc32"})) != info["crc32"]:
        raise ValueError(f"{path} is corrupt: its checksum does not match")
    if kind is not None and info["kind"] != kind:
        raise ValueError(f"{path} holds a {info['kind']}; wanted a {kind}")
    return tensors, info


def exists(path: str | Path) -> bool:
    """Whether `read` would find something there, in one file or several."""
    return Path(path).is_file() or bool(_parts(Path(path)))


def _part(path: Path, k: int, n: int) -> Path:
    return path.with_name(f"{path.stem}-{k}-of-{n}{path.suffix}")


def _parts(path: Path) -> list[Path]:
    found = path.parent.glob(f"{glob.escape(path.stem)}-*-of-*{path.suffix}")
    numbered = [(int(match[1]), name) for name in found if (match := re.fullmatch(r".*-(\d+)-of-\d+", name.stem))]
    return [name for _, name in sorted(numbered)]


def _groups(tensors: Mapping[str, Tensor], limit: int | None) -> list[list[str]]:
    """Names in order, cut so that a group's tensors and header stay below the limit."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, value in tensors.items():
        if limit is not None and value.nbytes + HEADER > limit:
            raise ValueError(f"limit={limit}: {name} alone has {value.nbytes} bytes")
        if limit is not None and groups[-1] and size + value.nbytes + HEADER > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += value.nbytes
    return groups


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


def save_model(
    path: str | Path, model: Denoiser | Generator, *, half: bool = False, limit: int | None = None, **info: Any
) -> list[Path]:
    """A denoiser or generator to one file that says how to build it; `info` is kept beside it as JSON.

    half: weights in float16, half the size. limit: as for `write`. Returns the files written.
    Raises TypeError for a model whose network is not one of `NETWORKS`.
    """
    denoiser: Any = model.denoiser if isinstance(model, Generator) else model
    config = getattr(getattr(denoiser, "network", None), "config", None)
    if config is None or config.get("kind") not in NETWORKS:
        raise TypeError(f"model has a {type(denoiser).__name__}; wanted one around {' or '.join(NETWORKS)}")
    recipe = {"network": config, "sigma_data": denoiser.sigma_data, "info": info}
    kind = "generator" if isinstance(model, Generator) else "denoiser"
    if isinstance(model, Generator):
        recipe |= {"sigma_init": model.sigma_init, "levels": list(model.levels)}
    weights = {name: value.half() if half else value for name, value in denoiser.network.state_dict().items()}
    return write(writable(path), weights, {"kind": kind, "recipe": json.dumps(recipe)}, limit=limit)


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
    if info["kind"] == "denoiser":
        return denoiser.eval(), recipe["info"]
    generator = Generator(denoiser, recipe["sigma_init"])
    generator.levels = tuple(recipe.get("levels", ()))  # files from before students of several steps have none
    return generator.eval(), recipe["info"]
