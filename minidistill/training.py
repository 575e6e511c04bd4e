"""The one training loop: progress bar, EMA, clipping, callbacks, checkpoints, exact resume, Ctrl-C, time budgets.

A run is a `State`; what one step does is a function `update(state) -> losses`, written by whoever trains
(`teachers.py`, `distillation/loop.py`). `fit` repeats it and looks after everything else, in one process or several.
"""

from __future__ import annotations

import json
import math
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from minidistill import _validate, checkpoints, parallel
from minidistill.networks import Denoiser


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


#: Extra arguments of every progress bar; a worker process puts its own line here.
bar_options: dict[str, Any] = {}
PATIENCE = 20  # so many skipped updates in a row end the run
AGREE_EVERY = 5  # several processes ask each other this often whether one of them was told to stop

Update = Callable[[State], dict[str, Tensor]]
Callback = Callable[[State], "dict[str, float] | None"]


def fit(
    state: State,
    update: Update,
    steps: int,
    *,
    batch_size: int | None = None,
    minutes: float | None = None,
    progress: bool = True,
    description: str = "training",
    log_every: int = 50,
    callbacks: Sequence[Callback] = (),
    callback_every: int = 500,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 500,
    resume: bool = False,
) -> State:
    """Call `update(state)` until `state.step == steps`, or until `minutes` have passed.

    Losses are logged to `state.history` every `log_every` steps; each callback is called every `callback_every`
    steps and at the end, and what it returns is added to the history too. With `batch_size`, records and bar also count
    the samples seen. With `checkpoint`, the whole state is written there every `checkpoint_every` steps, at the
    end and on Ctrl-C (which lets the step finish, saves, and then raises KeyboardInterrupt); with `resume`, it is read
    back first if the file is there. Of several processes (`parallel.py`) only number 0 writes and calls callbacks.

    An entry "skipped" of what `update` returns (as `optimizer_step`'s) says whether the step was left out.

    Raises:
        ValueError: bad counts, or a checkpoint that is corrupt or of another run.
        FloatingPointError: a loss became NaN or infinite and was not skipped, or 20 steps in a row were; the last
            checkpoint stays as it was.
    """
    for name, value in (("steps", steps), ("log_every", log_every), ("callback_every", callback_every),
                        ("checkpoint_every", checkpoint_every)):
        _validate.whole(name, value, least=0 if name == "steps" else 1)
    if minutes is not None:
        _validate.positive("minutes", minutes)
    deadline = time.monotonic() + 60 * (minutes if minutes is not None else math.inf)
    device, main = state.rng.device, parallel.rank() == 0
    path = None if checkpoint is None else checkpoints.writable(checkpoint)
    if path is not None and resume and path.exists():
        load_state(path, state)
    size = batch_size or 1
    bar = tqdm(
        total=steps * size, initial=state.step * size, disable=not progress or not main, desc=description,
        **({"unit": "sample", "unit_scale": True} if batch_size else {}), **bar_options,
    )
    skipped, in_a_row = torch.zeros((), device=device), torch.zeros((), device=device)
    with bar, _sigint() as stopped:
        while state.step < steps:
            losses = update(state)
            state.step += 1
            bar.update(size)
            bad = losses.pop("skipped", torch.zeros((), device=device))  # added up on the device: no waiting for it
            skipped, in_a_row = skipped + bad, (in_a_row + bad) * bad
            last, stopping, over = state.step == steps, stopped.is_set(), time.monotonic() > deadline
            if parallel.world() > 1:  # all must leave the loop at the same step
                agree = state.step % AGREE_EVERY == 0
                stopping, over = (agree and parallel.any_of(flag, device) for flag in (stopping, over))
            last = last or over
            record: dict[str, float] = {}
            saving = path is not None and (state.step % checkpoint_every == 0 or last or stopping)
            if state.step % log_every == 0 or last or saving or stopping:  # a state with NaNs is never saved
                record = parallel.mean(losses | {"skipped": skipped}, device)
                record = _checked(record, state, int(in_a_row))
                skipped = torch.zeros_like(skipped)
            if main and (state.step % callback_every == 0 or last):
                for callback in callbacks:
                    record |= callback(state) or {}
            if record:
                seen = {"images": state.step * batch_size} if batch_size else {}
                state.history.append({"step": state.step, **seen, **record})
                bar.set_postfix({name: f"{value:.3g}" for name, value in record.items()})
            if path is not None and saving and main:
                save_state(path, state)
            if stopping or (state.step == steps and stopped.is_set()):
                saved = f"; saved in {path}" if path else ""
                raise KeyboardInterrupt(f"stopped at step {state.step} of {steps}{saved}")
            if over:
                break
    return state


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


def _checked(record: dict[str, float], state: State, in_a_row: int) -> dict[str, float]:
    """The record without what is not finite, which is tolerated only while updates are skipped now and then."""
    new = round(record.pop("skipped"))
    state.skipped += new
    bad = [name for name, value in record.items() if not math.isfinite(value)]
    if (bad and not in_a_row) or in_a_row >= min(PATIENCE, state.step):
        what = ", ".join(bad) or "the gradient"
        length = f" ({in_a_row} updates in a row were skipped)" if in_a_row else ""
        raise FloatingPointError(f"{what} is not finite at step {state.step}{length}; try a lower learning rate")
    kept = {name: value for name, value in record.items() if name not in bad}
    return kept | ({"skipped": float(state.skipped)} if state.skipped else {})


@contextmanager
def _sigint() -> Iterator[threading.Event]:
    """While active, the first Ctrl-C only sets the event, so that a step is never cut in half; a second one raises as
    usual, unless it comes at once: then a launcher has passed on what the terminal had sent already."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only the main thread gets signals
        yield stopped
        return
    before, first = signal.getsignal(signal.SIGINT), math.inf

    def handle(signum: int, frame: object) -> None:
        nonlocal first
        if stopped.is_set() and time.monotonic() > first + 1:
            raise KeyboardInterrupt
        first = min(first, time.monotonic())
        stopped.set()

    signal.signal(signal.SIGINT, handle)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)
