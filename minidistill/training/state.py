"""A run's state, and how it is written to a file and read back, to the bit."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minidistill.training import checkpoints, parallel

__all__ = ["State", "load_state", "progress_of", "save_state"]


@dataclass
class State:
    """Everything that a run needs to go on as if it had never stopped.

    `config` describes the run (data, network, seed, ...); a checkpoint with another config is refused.
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
    """Write the whole state to one safetensors file, atomically."""
    tensors: dict[str, Tensor] = {"rng.torch": torch.get_rng_state(), "rng.run": state.rng.get_state()}
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    for name, module in state.modules.items():
        tensors |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
    groups = {}
    for name, optimizer in state.optimizers.items():
        saved = optimizer.state_dict()
        groups[name] = saved["param_groups"]
        for index, slots in saved["state"].items():
            tensors |= {f"opt.{name}.{index}.{slot}": torch.as_tensor(value) for slot, value in slots.items()}
    kind, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002 (the global generator, whoever uses it)
    meta = {
        "config": state.config, "step": state.step, "history": state.history, "skipped": state.skipped,
        "param_groups": groups,
        "python_rng": random.getstate(), "numpy_rng": [kind, np.asarray(keys).tolist(), position, has_gauss, gauss],
    }
    checkpoints.write(path, tensors, {"kind": "training", "state": json.dumps(meta)})


def progress_of(path: str | Path) -> dict[str, Any]:
    """How far the run saved there is: "step", "history", "skipped"; step 0 if there is no such file."""
    if not checkpoints.exists(path):
        return {"step": 0, "history": [], "skipped": 0}
    return json.loads(checkpoints.read(path, kind="training")[1]["state"])


def load_state(path: str | Path, state: State) -> None:
    """Read what `save_state` wrote into `state`, whose modules and optimizers must match.

    Raises ValueError, before anything is changed, for a corrupt file, another architecture or another config.
    """
    tensors, info = checkpoints.read(path, kind="training")
    meta = json.loads(info["state"])
    _same_config(path, meta["config"], json.loads(json.dumps(state.config)))
    weights = {name: checkpoints.part(tensors, f"{name}.") for name in state.modules}
    for name, module in state.modules.items():
        checkpoints.check_weights(path, name, weights[name], module)
    for name, module in state.modules.items():
        module.load_state_dict(weights[name])
    for name, optimizer in state.optimizers.items():
        slots: dict[int, dict[str, Tensor]] = {}
        for key, value in checkpoints.part(tensors, f"opt.{name}.").items():
            index, slot = key.split(".", 1)
            slots.setdefault(int(index), {})[slot] = value
        optimizer.load_state_dict({"state": slots, "param_groups": meta["param_groups"][name]})
    state.rng.set_state(tensors["rng.run"])
    torch.set_rng_state(tensors["rng.torch"])
    if "rng.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng.cuda"])
    version, internal, gauss_next = meta["python_rng"]
    random.setstate((version, tuple(internal), gauss_next))
    kind, keys, position, has_gauss, gauss = meta["numpy_rng"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))  # noqa: NPY002
    state.step, state.history, state.skipped = meta["step"], meta["history"], meta.get("skipped", 0)
    if parallel.rank():  # the file has process 0's state: others would drop out the same units as it
        torch.manual_seed(torch.initial_seed() + state.step + parallel.rank())


def _same_config(path: str | Path, saved: dict[str, Any], given: dict[str, Any]) -> None:
    changed = [key for key in sorted({*saved, *given}) if saved.get(key) != given.get(key)]
    if changed:
        what = "; ".join(f"{key} was {saved.get(key)!r} and is now {given.get(key)!r}" for key in changed)
        raise ValueError(f"{path} belongs to another run: {what}. Use the same arguments, or another file")

