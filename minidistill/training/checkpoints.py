"""Safetensors files: written atomically, with a checksum of every byte, and trusted in nothing when they are read.

What a file says is looked at before memory is spent on it: the header before the tensors, the tensors' shapes before a
network is built. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from minidistill import _validate
from minidistill.networks import MLP, Denoiser, Generator
from minidistill.networks.jumps import ROUTES
from minidistill.networks.unet import UNet
from minidistill.training.files import atomic, writable
from minidistill.training.plain import plain

__all__ = [
    "NETWORKS", "Header", "atomic", "check_finite", "check_weights", "exists", "halved", "layout_of", "load_model",
    "load_network", "malformed", "part", "read", "read_info", "save_model", "writable", "write",
]

M = TypeVar("M", bound=nn.Module)

#: The networks that a checkpoint may name in its header.
NETWORKS: dict[str, Callable[..., nn.Module]] = {"mlp": MLP, "unet": UNet}

LONGEST = 100_000_000  # bytes of a header; the format's own bound
_BLANK = "0" * 8  # in the checksum's place while the header's own is computed


@dataclass(frozen=True)
class Header:
    """What a file says about itself: its text, and for each tensor the shape and whether it is floating."""

    info: dict[str, str]
    layout: dict[str, tuple[tuple[int, ...], bool]]


def write(path: str | Path, tensors: Mapping[str, Tensor], info: Mapping[str, str]) -> Path:
    """Tensors and text in one safetensors file, the same bytes for the same content, with a checksum of all of them.

    Raises FloatingPointError for a NaN or an infinity, OSError if it can't be written; the old file then stays.
    """
    path = _validate.path("path", path)
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    check_finite(path, tensors)
    packed = memoryview(save(tensors))
    start = 8 + int.from_bytes(packed[:8], "little")
    fields, data = json.loads(bytes(packed[8:start])), packed[start:]
    after = f"{zlib.crc32(data):08x}"
    blank = _header_bytes(fields, info, _BLANK + after)
    with atomic(path) as partial, open(partial, "wb") as file:
        file.write(_header_bytes(fields, info, f"{zlib.crc32(blank):08x}" + after))
        file.write(data)
    return path


def _header_bytes(fields: Mapping[str, Any], info: Mapping[str, str], checksum: str) -> bytes:
    """The format's beginning: eight bytes of the header's length, then the header, which is JSON."""
    text = json.dumps(
        {"__metadata__": dict(sorted({**info, "checksum": checksum}.items())), **fields}, separators=(",", ":")
    ).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read(
    path: str | Path, kind: str | None = None, check: Callable[[Header], None] | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, text) of what `write` made.

    check: called with the header before the tensors are read, to raise ValueError if it is not what is wanted.
    Raises FileNotFoundError, or ValueError for a file that is truncated, corrupt, not ours or of another kind.
    """
    path = _validate.path("path", path)
    with _opened(path) as file:
        text, header = _header(path, file, kind)
        if check is not None:
            check(header)
        file.seek(0)
        whole = file.read()
    info, data = header.info, memoryview(whole)[len(text):]
    if not whole.startswith(text):
        raise ValueError(f"{path} changed while it was read")
    if "checksum" in info and f"{zlib.crc32(data):08x}" != info["checksum"][8:]:
        raise ValueError(f"{path} is corrupt: its checksum does not match")
    try:
        tensors = load(whole)
    except (SafetensorError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error})") from error
    if "checksum" not in info and str(_old_checksum(tensors, info)) != info["crc32"]:
        raise ValueError(f"{path} is corrupt: its checksum does not match")
    return tensors, info


def read_info(path: str | Path, kind: str | None = None) -> dict[str, str]:
    """The text alone of what `write` made; errors as `read`'s, but the tensors are not looked at."""
    path = _validate.path("path", path)
    with _opened(path) as file:
        info = _header(path, file, kind)[1].info
    return info if "checksum" in info else read(path, kind)[1]  # older files have one checksum for everything


def exists(path: str | Path) -> bool:
    """Whether there is a file for `read`."""
    return _validate.path("path", path).is_file()


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with path.open("rb") as file:
        yield file


def _header(path: Path, file: BinaryIO, kind: str | None) -> tuple[bytes, Header]:
    """(all bytes before the tensors, what they say), once that fits the file's size, the checksum and the kind."""
    size = os.fstat(file.fileno()).st_size
    first = file.read(8)
    length = int.from_bytes(first, "little")
    if len(first) < 8 or length > min(size - 8, LONGEST):
        raise ValueError(f"{path} is truncated or not a safetensors file: {size} bytes")
    text = first + file.read(length)
    try:
        fields = json.loads(text[8:])
        info = fields.pop("__metadata__", {})
        layout = {name: (tuple(each["shape"]), "F" in each["dtype"]) for name, each in fields.items()}
        told = len(text) + max([each["data_offsets"][1] for each in fields.values()], default=0)
        good = all(isinstance(value, str) for value in info.values())
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({type(error).__name__})") from error
    if told != size:
        raise ValueError(f"{path} is truncated or corrupt: {size} bytes, where its header tells of {told}")
    if not good or not {"checksum", "crc32"} & info.keys() or "kind" not in info:
        raise ValueError(f"{path} was not written by minidistill")
    if "checksum" in info and _header_checksum(text, info["checksum"]) != info["checksum"][:8]:
        raise ValueError(f"{path} is corrupt: its header's checksum does not match")
    if kind is not None and info["kind"] != kind:
        raise ValueError(f"{path} holds a {info['kind']}; wanted a {kind}")
    return text, Header(info, layout)


def _header_checksum(text: bytes, checksum: str) -> str:
    """Of every byte before the tensors, its own eight digits left blank; "" if they are not where they should be."""
    field = f'"checksum":"{checksum}"'.encode()
    blank = f'"checksum":"{_BLANK}{checksum[8:]}"'.encode()
    return f"{zlib.crc32(text.replace(field, blank)):08x}" if text.count(field) == 1 else ""


def _old_checksum(tensors: Mapping[str, Tensor], info: Mapping[str, str]) -> int:
    """As files had it at first: of text, names and bytes, but not of types and shapes."""
    text = {key: value for key, value in info.items() if key != "crc32"}
    total = zlib.crc32(json.dumps(text, sort_keys=True).encode())
    for name in sorted(tensors):
        total = zlib.crc32(name.encode(), total)
        total = zlib.crc32(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(), total)
    return total


# ------------------------------------------------------------------------------------ what is in them

def part(tensors: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The entries whose name starts with the prefix, without it."""
    return {name[len(prefix):]: value for name, value in tensors.items() if name.startswith(prefix)}


def layout_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[tuple[int, ...], bool]]:
    """Shapes and whether they are floating, as a `Header` has them."""
    return {name: (tuple(value.shape), value.is_floating_point()) for name, value in tensors.items()}


def check_weights(
    path: str | Path, name: str, given: Mapping[str, tuple[tuple[int, ...], bool]], module: nn.Module
) -> None:
    """Raise ValueError unless a layout (`Header.layout`) has just the names, shapes and kinds of the module's own."""
    own = layout_of(module.state_dict())
    for key in sorted({*own, *given}):
        (here, floating), (there, floats) = (layout.get(key, ("none", True)) for layout in (own, given))
        if here != there:
            raise ValueError(f"{path} is of another architecture: {name}.{key} has shape {there} there; wanted {here}")
        if floats != floating:
            kinds = "floating point numbers", "whole numbers"
            raise ValueError(f"{path}: {name}.{key} holds {kinds[floating]}; wanted {kinds[not floating]}")


def check_finite(where: str | Path, tensors: Mapping[str, Tensor], error: type[Exception] = FloatingPointError) -> None:
    """Raise the error unless all floating tensors are finite: one reduction over all, and one look at its result."""
    floating = {name: value for name, value in tensors.items() if value.is_floating_point() and value.numel()}
    if bool(nn.utils.get_total_norm(list(floating.values()), float("inf")).isfinite()):
        return
    bad = [name for name, value in floating.items() if not bool(value.isfinite().all())]
    if bad:
        more = f" (as {len(bad) - 1} others)" if len(bad) > 1 else ""
        raise error(f"{where}: {bad[0]}{more} has NaN or infinite values; wanted finite numbers")


def halved(path: str | Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Floating tensors in float16, others as they are. FloatingPointError for one that is too large for it."""
    limit = torch.finfo(torch.float16).max
    for name, value in tensors.items():
        if value.is_floating_point() and value.numel() and limit < (peak := float(value.abs().max())) < float("inf"):
            raise FloatingPointError(f"{path}: {name} reaches {peak:g}, above float16's {limit:g}; wanted float32")
    return {name: value.half() if value.is_floating_point() else value for name, value in tensors.items()}


@contextmanager
def malformed(path: str | Path) -> Iterator[None]:
    """Whatever goes wrong inside, because a file's text is not what it should be, is one ValueError naming the file."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{path} is malformed ({said[:300]})") from error


# --------------------------------------------------------------------------------------------- models

def save_model(path: str | Path, model: Denoiser | Generator, *, half: bool = False, **info: Any) -> Path:
    """A denoiser or generator to one file that says how to build it; `info` is kept beside it as JSON.

    half: weights in float16, half the size.
    Raises TypeError for a model whose network is not one of `NETWORKS` and for info that JSON does not know,
    FloatingPointError for weights that are not finite, or too large for float16; the old file then stays.
    """
    denoiser: Any = model.denoiser if isinstance(model, Generator) else model
    config = getattr(getattr(denoiser, "network", None), "config", None)
    if config is None or config.get("kind") not in NETWORKS:
        raise TypeError(f"model has a {type(denoiser).__name__}; wanted one around {' or '.join(NETWORKS)}")
    recipe = {"network": config, "sigma_data": denoiser.sigma_data}
    kind = "generator" if isinstance(model, Generator) else "denoiser"
    if isinstance(model, Generator):
        recipe |= {"sigma_init": model.sigma_init, "levels": list(model.levels)}
        recipe |= {"route": model.route} if model.route != "call" else {}
    text = json.dumps(plain("model", recipe) | {"info": plain("info", info)})
    weights = denoiser.network.state_dict()
    return write(writable(path), halved(path, weights) if half else weights, {"kind": kind, "recipe": text})


def load_model(path: str | Path) -> tuple[Denoiser | Generator, dict[str, Any]]:
    """(model in eval mode, its info) from a file that `save_model` wrote.

    Raises FileNotFoundError, or ValueError, naming the file, for one that is corrupt, holds something else, or whose
    recipe does not make a network of just its tensors; that is found out before the network takes any memory.
    """
    path = _validate.path("path", path)
    network, recipe, kind = load_network(path, ("denoiser", "generator"), _build)
    with malformed(path):
        info = dict(recipe["info"])
        denoiser = Denoiser(network, recipe["sigma_data"])
        if kind == "denoiser":
            return denoiser.eval(), info
        generator = Generator(denoiser, recipe["sigma_init"])
        # Files from before students of several steps have no levels.
        generator.levels = tuple(float(level) for level in recipe.get("levels", ()))
        for level in generator.levels:
            _validate.positive("levels", level)
        generator.route = recipe.get("route", "call")  # nor those from before jumps a route
        _validate.choose("route", generator.route, ROUTES)
        if (generator.route == "jump") != (getattr(network, "where_to", None) is not None):
            told = "is not" if generator.route == "jump" else "is"
            raise ValueError(f"{path}: a student of route {generator.route!r}, whose network {told} told where to jump")
        return generator.eval(), info


def _build(config: dict[str, Any]) -> nn.Module:
    build = _validate.choose("network kind", config["kind"], NETWORKS)
    rest = {key: value for key, value in config.items() if key != "kind"}
    return build(**{**rest, "shape": tuple(rest["shape"])})


def load_network(
    path: str | Path, kinds: Iterable[str], build: Callable[[dict[str, Any]], M]
) -> tuple[M, dict[str, Any], str]:
    """(`build(recipe["network"])` with the file's weights, its recipe, its kind), for a file of one of the kinds whose
    text "recipe" is a JSON object. ValueError, naming the file, for anything else, before memory is taken."""
    path = _validate.path("path", path)
    recipe: dict[str, Any] = {}

    def check(header: Header) -> None:
        if header.info["kind"] not in kinds:
            raise ValueError(f"{path} holds a {header.info['kind']}; wanted a {' or a '.join(kinds)}")
        with malformed(path):
            recipe.update(json.loads(header.info["recipe"]))
            with torch.device("meta"), _at_most(len(header.layout)):
                network = build(dict(recipe["network"]))
        check_weights(path, "network", header.layout, network)

    weights, info = read(path, check=check)
    check_finite(path, weights, ValueError)
    network = build(dict(recipe["network"]))  # now known to be as large as the file
    network.load_state_dict(weights)
    return network, recipe, info["kind"]


@contextmanager
def _at_most(tensors: int) -> Iterator[None]:
    """While active, a network that comes to have more parameters than a file has tensors is built no further: on the
    meta device weights take no memory, but the modules of a hundred million layers do."""
    left, mine = tensors, threading.get_ident()

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal left
        if parameter is not None and threading.get_ident() == mine:
            left -= 1
            if left < 0:
                raise ValueError(f"its recipe asks for more than the {tensors} tensors that are there")

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()
