"""A run's state, and how it is written to a file and read back, to the bit."""

from __future__ import annotations

import json
import random
import warnings
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minidistill import _validate
from minidistill.training import checkpoints, parallel
from minidistill.training.checkpoints import Header
from minidistill.training.plain import plain

__all__ = ["State", "check_state", "load_state", "progress_of", "save_state"]


@dataclass
class State:
    """Everything that a run needs to go on as if it had never stopped.

    `config` describes the run (data, network, seed, ...); a checkpoint with another config is refused. Its entry
    "checksums" (of teacher, data, labels: `fingerprint`) is compared where the checkpoint has one too.
    `skipped` counts the updates that were left out because their gradient was not finite.
    """

    modules: dict[str, nn.Module]
    optimizers: dict[str, torch.optim.Optimizer]
    rng: torch.Generator
    config: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    skipped: int = 0


def save_state(path: str | Path, state: State) -> None:
    """Write the whole state to one safetensors file, atomically: the same bytes for the same state.

    Raises FloatingPointError for a NaN or an infinity in it, OSError if it can't be written; the old file then stays.
    """
    tensors: dict[str, Tensor] = {"rng.torch": torch.get_rng_state(), "rng.run": state.rng.get_state()}
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    tensors |= _tensors(state)
    kind, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002 (the global generator, whoever uses it)
    meta = {
        "config": plain("config", state.config), "step": state.step, "history": state.history,
        "skipped": state.skipped, "device": state.rng.device.type,
        "optimizers": {name: type(optimizer).__name__ for name, optimizer in state.optimizers.items()},
        "param_groups": plain("param_groups", {name: optimizer.state_dict()["param_groups"]
                                               for name, optimizer in state.optimizers.items()}),
        "python_rng": random.getstate(), "numpy_rng": [kind, np.asarray(keys).tolist(), position, has_gauss, gauss],
    }
    checkpoints.write(path, tensors, {"kind": "training", "state": json.dumps(meta)})


def _tensors(state: State) -> dict[str, Tensor]:
    """Of modules and optimizers, under the names they have in a file."""
    tensors = {f"{name}.{key}": value for name, module in state.modules.items()
               for key, value in module.state_dict().items()}
    for name, optimizer in state.optimizers.items():
        for index, slots in optimizer.state_dict()["state"].items():
            tensors |= {f"opt.{name}.{index}.{slot}": torch.as_tensor(value) for slot, value in slots.items()}
    return tensors


def check_state(state: State) -> None:
    """Raise FloatingPointError, naming the first, if weights or an optimizer's memory are not finite."""
    checkpoints.check_finite(f"after step {state.step} (try a lower learning rate)", _tensors(state))


def progress_of(path: str | Path) -> dict[str, Any]:
    """How far the run saved there is: "step", "history", "skipped"; step 0 if there is no such file."""
    if not checkpoints.exists(path):
        return {"step": 0, "history": [], "skipped": 0}
    return _meta(_validate.path("path", path), checkpoints.read_info(path, kind="training"))


def load_state(path: str | Path, state: State) -> None:
    """Read what `save_state` wrote into `state`, whose modules and optimizers must match.

    On a device of another type than the run began on, its random numbers begin anew; a warning says so.
    Raises ValueError, before anything is changed, for a corrupt or malformed file, another architecture or config.
    """
    path = _validate.path("path", path)
    meta: dict[str, Any] = {}

    def check(header: Header) -> None:
        meta.update(_meta(path, header.info))
        _same_config(path, meta["config"], plain("config", state.config))
        for name, module in state.modules.items():
            checkpoints.check_weights(path, name, checkpoints.part(header.layout, f"{name}."), module)
        with checkpoints.malformed(path):
            _check_optimizers(path, meta, header, state)

    tensors, _ = checkpoints.read(path, "training", check)
    own = {name: value for name, value in tensors.items() if not name.startswith("rng.")}
    checkpoints.check_finite(path, own, ValueError)
    with checkpoints.malformed(path):
        generators = _generators(path, meta, tensors, state)
    # From here on nothing can go wrong.
    for name, module in state.modules.items():
        module.load_state_dict(checkpoints.part(tensors, f"{name}."))
    for name, optimizer in state.optimizers.items():
        optimizer.load_state_dict({"state": _slots(name, tensors), "param_groups": meta["param_groups"][name]})
    for restore in generators:
        restore()
    state.step, state.history, state.skipped = meta["step"], meta["history"], meta["skipped"]
    if parallel.rank():  # the file has process 0's state: others would drop out the same units as it
        torch.manual_seed(torch.initial_seed() + state.step + parallel.rank())


def _meta(path: str | Path, info: Mapping[str, str]) -> dict[str, Any]:
    """The text of a state's file, its entries of the types that they should have."""
    with checkpoints.malformed(path):
        meta = {"skipped": 0} | json.loads(info["state"])  # files from before updates were skipped have none
        for name, kind in (("config", dict), ("step", int), ("history", list), ("skipped", int),
                           ("param_groups", dict)):
            if not isinstance(meta[name], kind):
                raise TypeError(f"{name} is {type(meta[name]).__name__}; wanted {kind.__name__}")
        if meta["step"] < 0 or not all(isinstance(record, dict) for record in meta["history"]):
            raise ValueError("step or history")
    return meta


def _same_config(path: str | Path, saved: dict[str, Any], given: dict[str, Any]) -> None:
    """Raise ValueError if a run with the given config is not the one that was saved."""
    old, new = (dict(config.get("checksums") or {}) for config in (saved, given))
    others = [name for name, value in old.items() if new.get(name) != value]
    keys = {*saved, *given} - {"checksums"}  # files from before there were any have none to compare
    what = [f"{key} was {saved.get(key)!r} and is now {given.get(key)!r}"
            for key in sorted(keys) if saved.get(key) != given.get(key)]
    what += [f"its {name} had the checksum {old[name]} and the {name} given now {new.get(name)}" for name in others]
    if what:
        raise ValueError(f"{path} belongs to another run: {'; '.join(what)}. Use the same arguments, or another file")


def _check_optimizers(path: str | Path, meta: dict[str, Any], header: Header, state: State) -> None:
    """Raise ValueError unless groups, and what is remembered of each parameter, are as the optimizers have them."""
    prefixes = ("rng.", *(f"{name}." for name in state.modules), *(f"opt.{name}." for name in state.optimizers))
    for name in header.layout:
        if not name.startswith(prefixes):
            raise ValueError(f"{path}: nothing of this run is called {name}")
    for name, optimizer in state.optimizers.items():
        kind = type(optimizer).__name__
        if meta.get("optimizers", {}).get(name, kind) != kind:
            raise ValueError(f"{path} belongs to another run: its optimizer {name} is not {kind}")
        own, saved = optimizer.state_dict()["param_groups"], meta["param_groups"][name]
        if [group["params"] for group in own] != [group["params"] for group in saved]:
            raise ValueError(f"{path} belongs to another run: the optimizer {name} has other parameters there")
        for mine, group in zip(own, saved, strict=True):
            wrong = [key for key in mine.keys() & group.keys() if not _alike(mine[key], group[key])]
            if wrong:
                raise ValueError(f"{path}: the optimizer {name} has {wrong[0]}={group[wrong[0]]!r}")
        shapes = [tuple(p.shape) for group in optimizer.param_groups for p in group["params"]]
        slots = _slots(name, header.layout)
        for index, layouts in slots.items():
            if layouts.keys() != next(iter(slots.values())).keys():
                raise ValueError(f"{path}: the optimizer {name} does not remember the same of each parameter")
            for slot, (shape, floating) in layouts.items():
                if index < 0 or shape not in (shapes[index], (), (1,)) or (shape and not floating):
                    raise ValueError(f"{path}: opt.{name}.{index}.{slot} has shape {shape}; wanted {shapes[index]}")


def _alike(a: Any, b: Any) -> bool:
    """Whether two options of an optimizer are of one kind; None and a bool are, since devices choose between them."""
    numbers = [isinstance(value, (int, float)) and not isinstance(value, bool) for value in (a, b)]
    lists = [isinstance(value, (list, tuple)) for value in (a, b)]
    return numbers[0] == numbers[1] and lists[0] == lists[1] and not isinstance(b, (str, dict))


def _slots(name: str, entries: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """What a file has of an optimizer, by parameter and slot."""
    slots: dict[int, dict[str, Any]] = {}
    for key, value in checkpoints.part(entries, f"opt.{name}.").items():
        index, slot = key.split(".", 1)
        slots.setdefault(int(index), {})[slot] = value
    return slots


def _generators(
    path: str | Path, meta: dict[str, Any], tensors: dict[str, Tensor], state: State
) -> list[Callable[[], Any]]:
    """What brings every random generator back, each tried out first on one that nobody uses."""
    torch.Generator().set_state(tensors["rng.torch"])
    version, internal, gauss_next = meta["python_rng"]
    python = (version, tuple(internal), gauss_next)
    random.Random().setstate(python)
    kind, keys, position, has_gauss, gauss = meta["numpy_rng"]
    numpy = (kind, np.array(keys, dtype=np.uint32), position, has_gauss, gauss)
    np.random.RandomState().set_state(numpy)
    restore: list[Callable[[], Any]] = [
        lambda: torch.set_rng_state(tensors["rng.torch"]), lambda: random.setstate(python),
        lambda: np.random.set_state(numpy),  # noqa: NPY002
    ]
    mine, saved = state.rng.device.type, tensors["rng.run"]
    # Older files do not name the device; its generator's state has a size of its own.
    same = meta["device"] == mine if "device" in meta else saved.numel() == state.rng.get_state().numel()
    if same:
        torch.Generator(state.rng.device).set_state(saved)
        if "rng.cuda" in tensors and torch.cuda.is_available():
            torch.Generator("cuda").set_state(tensors["rng.cuda"])
            restore.append(lambda: torch.cuda.set_rng_state(tensors["rng.cuda"]))
        return [*restore, lambda: state.rng.set_state(saved)]
    before = meta.get("device", "another device")
    warnings.warn(f"{path} was begun on {before} and goes on on {mine}: its random numbers begin anew, so it will not "
                  "end as it would have there", stacklevel=3)
    seed = zlib.crc32(saved.numpy().tobytes())
    return [*restore, lambda: state.rng.manual_seed(seed)]
