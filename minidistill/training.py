"""The one training loop: progress bar, EMA, clipping, callbacks, checkpoints, exact resume, Ctrl-C.

A run is a `State`; what one step does is a function `update(state) -> losses`, written by whoever trains
(`teachers.py`, `distillation/loop.py`). `fit` repeats it and looks after everything else.
"""

from __future__ import annotations

import json
import math
import random
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from minidistill import _validate, checkpoints


@dataclass
class State:
    """Everything that a run needs to go on as if it had never stopped.

    `config` describes the run (data, network, seed, ...); a checkpoint with another config is refused.
    """

    modules: dict[str, nn.Module]
    optimizers: dict[str, torch.optim.Optimizer]
    rng: torch.Generator
    config: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)


#: Extra arguments of every progress bar; a worker process puts its own line here.
bar_options: dict[str, Any] = {}

Update = Callable[[State], dict[str, Tensor]]
Callback = Callable[[State], "dict[str, float] | None"]


def fit(
    state: State,
    update: Update,
    steps: int,
    *,
    progress: bool = True,
    description: str = "training",
    log_every: int = 50,
    callbacks: Sequence[Callback] = (),
    callback_every: int = 500,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 500,
    resume: bool = False,
) -> State:
    """Call `update(state)` until `state.step == steps`.

    Losses are logged to `state.history` every `log_every` steps; each callback is called every `callback_every`
    steps and at the end, and what it returns is added to the history too. With `checkpoint`, the whole
    state is written there every `checkpoint_every` steps, at the end and on Ctrl-C (which lets the step
    finish, saves, and then raises KeyboardInterrupt); with `resume`, it is read back first if the file is there.

    Raises:
        ValueError: bad counts, or a checkpoint that is corrupt or of another run.
        FloatingPointError: a loss became NaN or infinite; the last checkpoint stays as it was.
    """
    for name, value in (("steps", steps), ("log_every", log_every), ("callback_every", callback_every),
                        ("checkpoint_every", checkpoint_every)):
        _validate.whole(name, value, least=0 if name == "steps" else 1)
    path = None if checkpoint is None else checkpoints.writable(checkpoint)
    if path is not None and resume and path.exists():
        load_state(path, state)
    bar = tqdm(total=steps, initial=state.step, disable=not progress, desc=description, **bar_options)
    with bar, _sigint() as stopped:
        while state.step < steps:
            losses = update(state)
            state.step += 1
            bar.update()
            last, stopping = state.step == steps, stopped.is_set()  # read once: a Ctrl-C may come at any time
            record: dict[str, float] = {}
            saving = path is not None and (state.step % checkpoint_every == 0 or last or stopping)
            if state.step % log_every == 0 or last or saving:  # a state with NaNs is never saved
                record = {name: float(value) for name, value in losses.items()}
                _refuse_non_finite(record, state.step)
            if state.step % callback_every == 0 or last:
                for callback in callbacks:
                    record |= callback(state) or {}
            if record:
                state.history.append({"step": state.step, **record})
                bar.set_postfix({name: f"{value:.3g}" for name, value in record.items()})
            if path is not None and saving:
                save_state(path, state)
            if stopping or (last and stopped.is_set()):
                saved = f"; saved in {path}" if path else ""
                raise KeyboardInterrupt(f"stopped at step {state.step} of {steps}{saved}")
    return state


def optimizer_step(loss: Tensor, optimizer: torch.optim.Optimizer, clip: float | None = None) -> None:
    """Backward pass of a scalar loss and one update of the optimizer's parameters, the gradient's norm clipped."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    grads = torch.autograd.grad(loss, parameters)  # only these: a generator's loss leaves the fake network alone
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad
    if clip is not None:
        nn.utils.clip_grad_norm_(parameters, clip)
    optimizer.step()


def schedule(step: int, steps: int, warmup: int = 0, hold: float = 0.2) -> float:
    """The learning rate's factor: a linear warm-up, 1 until `hold` of the run, then linearly to 0."""
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    return rise * min(1.0, (1 - step / steps) / (1 - hold))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


@torch.no_grad()
def update_ema(ema: list[Tensor], model: list[Tensor], halflife: float, batch_size: int, step: int) -> None:
    """ema <- model + decay (ema - model), the past's weight halving every `halflife` samples seen; the
    half-life is at most a twentieth of what was seen so far (Karras 2022, appendix F.1), so the start fades."""
    halflife = min(halflife, 0.05 * (step + 1) * batch_size)
    decay = 0.5 ** (batch_size / max(halflife, 1e-8))
    torch._foreach_lerp_(ema, model, 1 - decay)


def generator_on(device: torch.device | str, seed: int) -> torch.Generator:
    """A random generator on the device, seeded."""
    _validate.whole("seed", seed, least=0)
    return torch.Generator(device).manual_seed(seed)


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
        "config": state.config, "step": state.step, "history": state.history, "param_groups": groups,
        "python_rng": random.getstate(), "numpy_rng": [kind, np.asarray(keys).tolist(), position, has_gauss, gauss],
    }
    checkpoints.write(path, tensors, {"kind": "training", "state": json.dumps(meta)})


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
    state.step, state.history = meta["step"], meta["history"]


def _same_config(path: str | Path, saved: dict[str, Any], given: dict[str, Any]) -> None:
    changed = [key for key in sorted({*saved, *given}) if saved.get(key) != given.get(key)]
    if changed:
        what = "; ".join(f"{key} was {saved.get(key)!r} and is now {given.get(key)!r}" for key in changed)
        raise ValueError(f"{path} belongs to another run: {what}. Use the same arguments, or another file")


def _refuse_non_finite(record: dict[str, float], step: int) -> None:
    bad = [name for name, value in record.items() if not math.isfinite(value)]
    if bad:
        raise FloatingPointError(f"{', '.join(bad)} is not finite at step {step}; try a lower learning rate")


@contextmanager
def _sigint() -> Iterator[threading.Event]:
    """While active, the first Ctrl-C only sets the event, so that a step is never cut in half; the second one
    raises as usual."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only the main thread gets signals
        yield stopped
        return
    before = signal.getsignal(signal.SIGINT)

    def handle(signum: int, frame: object) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()

    signal.signal(signal.SIGINT, handle)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)
