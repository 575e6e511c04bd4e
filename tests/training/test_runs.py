"""What becomes of a run: numbers recorded, signals, explosions, disks that are full, resumption with something else."""

import contextlib
import errno
import itertools
import json
import os
import random
import signal

import numpy as np
import pytest
import torch
from torch import nn

from minidistill import training
from minidistill.distributions import ring
from minidistill.networks import MLP
from minidistill.networks.unet import UNet
from minidistill.teachers import distil_energy, train_denoiser
from minidistill.training import checkpoints, files, loop, parallel
from minidistill.training import state as state_module
from tests.helpers import clone_state, small_ring, states_equal
from tests.training.test_training import distill_run, teacher_run, toy_state, toy_update


def rewritten(file, change):
    """The state's file again, with a valid checksum, its text and tensors changed by `change(meta, tensors)`."""
    tensors, info = checkpoints.read(file)
    meta = json.loads(info["state"])
    change(meta, tensors)
    checkpoints.write(file, tensors, {"kind": "training", "state": json.dumps(meta)})


# ---------------------------------------------------------------------- numbers of NumPy and PyTorch

@pytest.mark.parametrize("number", [
    np.float32(0.5), np.float64(0.5), np.array(0.5), torch.tensor(0.5), torch.tensor(0.5, dtype=torch.float16), 0.5,
    nn.Parameter(torch.tensor(0.5)),
])
def test_numbers_of_any_library_are_recorded_as_plain_ones(tmp_path, number):
    file = tmp_path / "run.safetensors"
    whole = np.int64(3) if isinstance(number, np.generic) else torch.tensor(3)

    def callback(state):
        return {"kl": number, "modes": whole, "all": np.bool_(True)}

    state = training.fit(toy_state(), toy_update, 4, progress=False, callbacks=[callback], callback_every=2,
                         checkpoint=file)
    for record in (state.history[-1], training.progress_of(file)["history"][-1]):
        assert (record["kl"], record["modes"], record["all"]) == (0.5, 3, True)
        assert [type(record[name]) for name in ("kl", "modes", "all")] == [float, int, bool]


@pytest.mark.parametrize(("returned", "said"), [
    ({"curve": [1.0]}, "'curve', which a callback returned, is list; wanted a number"),
    ({"curve": torch.ones(2)}, r"'curve', .* is Tensor of shape \(2,\)"), ({"curve": "low"}, "'curve'"),
    ({"curve": None}, "'curve'"), ({"curve": 1j}, "'curve'"), ({3: 0.5}, "the key 3"),
    (0.5, "a callback returned float"), ([], "a callback returned list"),
])
def test_what_is_no_number_is_an_error_when_it_is_returned(tmp_path, returned, said):
    """Not hundreds of steps later, when it can't be written."""
    file, seen = tmp_path / "run.safetensors", []
    with pytest.raises(TypeError, match=said):
        training.fit(toy_state(), lambda state: seen.append(state.step) or toy_update(state), 50, progress=False,
                     callbacks=[lambda state: returned], callback_every=2, checkpoint=file)
    assert seen == [0, 1]


def test_a_run_whose_numbers_are_numpys_is_saved_and_resumed(tmp_path):
    file, data = tmp_path / "run.safetensors", torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    options = {"steps": 2, "batch_size": 4, "checkpoint": file, "progress": False}

    def network():
        n = np.int64
        return UNet((n(1), n(8), n(8)), channels=n(8), multipliers=np.array([1, 2]), blocks=n(1), dropout=np.float32(0))

    first = train_denoiser(data, network(), **options)
    assert states_equal(train_denoiser(data, network(), resume=True, **options).state_dict(), first.state_dict())


def test_a_config_that_no_file_can_hold_is_an_error_before_the_first_step(tmp_path):
    state, seen = toy_state(), []
    state.config = {"network": {"activation": torch.tanh}}
    with pytest.raises(TypeError, match=r"config\.network\.activation is builtin_function_or_method"):
        training.fit(state, seen.append, 5, progress=False, checkpoint=tmp_path / "run.safetensors")
    assert not seen


# ---------------------------------------------------------------------- checks come before changes

class Elsewhere:
    """A generator as of a device of another type: its state has 16 bytes."""

    def __init__(self):
        self.inner = torch.Generator().manual_seed(3)

    device = torch.device("cuda")

    def get_state(self):
        return torch.arange(16, dtype=torch.uint8)


@pytest.mark.parametrize("old", [False, True])
def test_a_run_can_go_on_on_another_device_and_says_so(tmp_path, old):
    """Files from before the device was named tell it by the size of the generator's state."""
    file, saved, other = tmp_path / "run.safetensors", toy_state(2.0), toy_state(1.0)
    saved.rng, saved.step = Elsewhere(), 7
    training.save_state(file, saved)
    if old:
        rewritten(file, lambda meta, tensors: [meta.pop("device"), meta.pop("optimizers")])
    with pytest.warns(UserWarning, match=r"goes on on cpu: its random numbers begin anew"):
        training.load_state(file, other)
    assert other.step == 7
    assert states_equal(other.modules["net"].state_dict(), saved.modules["net"].state_dict())
    again = toy_state()
    with pytest.warns(UserWarning, match="goes on on cpu"):
        training.load_state(file, again)
    assert torch.equal(again.rng.get_state(), other.rng.get_state())  # the same for the same file


def adam_state(features=2):
    torch.manual_seed(0)
    net = nn.Linear(features, 1)
    optimizer = torch.optim.Adam(net.parameters(), 0.1)
    training.optimizer_step(net(torch.ones(1, features)).sum(), optimizer)
    return training.State({"net": net}, {"net": optimizer}, torch.Generator().manual_seed(0), {"run": "toy"})


def set_entry(*keys, to):
    def change(meta, tensors):
        for key in keys[:-1]:
            meta = meta[key]
        meta[keys[-1]] = to

    return change


MALFORMED = {
    "generator": lambda meta, tensors: tensors.update({"rng.run": torch.zeros(16, dtype=torch.uint8)}),
    "no generator": lambda meta, tensors: tensors.pop("rng.run"),
    "torch's generator": lambda meta, tensors: tensors.update({"rng.torch": torch.zeros(5056, dtype=torch.uint8)}),
    "python's generator": set_entry("python_rng", to=[3, [1, 2], None]),
    "numpy's generator": set_entry("numpy_rng", to=["MT19937", [1, 2], 0, 0, 0.0]),
    "numpy's numbers": set_entry("numpy_rng", 1, to=[-1] * 624),
    "no step": lambda meta, tensors: meta.pop("step"),
    "step": set_entry("step", to="7"),
    "negative step": set_entry("step", to=-7),
    "history": set_entry("history", to=[3]),
    "config": set_entry("config", to=[]),
    "groups": set_entry("param_groups", to={}),
    "group": set_entry("param_groups", "net", to=[3]),
    "parameters": set_entry("param_groups", "net", 0, "params", to=[0, 1, 2]),
    "rate": set_entry("param_groups", "net", 0, "lr", to="fast"),
    "betas": set_entry("param_groups", "net", 0, "betas", to=0.9),
    "another optimizer": set_entry("optimizers", "net", to="SGD"),
    "moment": lambda meta, tensors: tensors.update({"opt.net.0.exp_avg": torch.zeros(1, 3)}),
    "whole moment": lambda meta, tensors: tensors.update({"opt.net.0.exp_avg": torch.zeros(1, 2, dtype=torch.int32)}),
    "no moment": lambda meta, tensors: tensors.pop("opt.net.0.exp_avg"),
    "moment of nothing": lambda meta, tensors: tensors.update({"opt.net.2.exp_avg": torch.zeros(1, 2)}),
    "moment of nothing nameable": lambda meta, tensors: tensors.update({"opt.net.x.exp_avg": torch.zeros(1, 2)}),
    "something else": lambda meta, tensors: tensors.update({"more": torch.zeros(3)}),
    "weights": lambda meta, tensors: tensors.update({"net.weight": torch.zeros(1, 2, dtype=torch.int32)}),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_states_file_is_checked_before_anything_changes(tmp_path, name):
    """The last thing that could be wrong is found before the first is loaded, and the error names the file."""
    file, saved = tmp_path / "run.safetensors", adam_state()
    saved.step = 5
    training.save_state(file, saved)
    rewritten(file, MALFORMED[name])
    other = adam_state()
    with torch.no_grad():
        other.modules["net"].weight += 1
    random.seed(5)
    before = (clone_state(other.modules["net"]), json.dumps(other.optimizers["net"].state_dict(), default=str),
              torch.get_rng_state(), random.getstate(), other.rng.get_state())
    with pytest.raises(ValueError) as caught:
        training.load_state(file, other)
    assert str(file) in str(caught.value)
    after = (clone_state(other.modules["net"]), json.dumps(other.optimizers["net"].state_dict(), default=str),
             torch.get_rng_state(), random.getstate(), other.rng.get_state())
    assert states_equal(before[0], after[0])
    assert torch.equal(before[2], after[2])
    assert torch.equal(before[4], after[4])
    assert (before[1], before[3], other.step) == (after[1], after[3], 0)


@pytest.mark.parametrize("text", ["[" * 100_000, "3", "{}", "no JSON", '{"step": 1}'])
def test_progress_of_a_malformed_file_is_an_error_that_names_it(tmp_path, text):
    file = checkpoints.write(tmp_path / "run.safetensors", {"a": torch.ones(1)}, {"kind": "training", "state": text})
    with pytest.raises(ValueError, match=r"run\.safetensors is malformed"):
        training.progress_of(file)


# ---------------------------------------------------------------------- another teacher, other data

DATA = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))


def test_a_run_is_not_resumed_with_other_data_or_labels(tmp_path):
    file, labels = tmp_path / "run.safetensors", torch.arange(64) % 2
    options = {"steps": 2, "batch_size": 8, "progress": False, "checkpoint": file}
    train_denoiser(DATA, labels=labels, **options)
    train_denoiser(DATA.clone(), labels=labels.clone(), resume=True, **options)
    other = DATA.clone()
    other[3] = other[3].flip(0)  # of the same shape and standard deviation
    with pytest.raises(ValueError, match=r"belongs to another run: its data had the checksum \w{8} and the data given"):
        train_denoiser(other, labels=labels, resume=True, **options)
    with pytest.raises(ValueError, match="its labels had the checksum"):
        train_denoiser(DATA, labels=1 - labels, resume=True, **options)


def test_an_energy_is_not_resumed_with_another_teacher(tmp_path):
    options = {"steps": 2, "batch_size": 8, "progress": False, "checkpoint": tmp_path / "run.safetensors"}
    distil_energy(ring(8), DATA, **options)
    with pytest.raises(ValueError, match="its teacher had the checksum"):
        distil_energy(ring(8, std=0.3), DATA, resume=True, **options)
    distil_energy(ring(8), DATA, resume=True, **options)


def test_runs_from_before_there_were_checksums_go_on(tmp_path):
    file = tmp_path / "run.safetensors"
    options = {"steps": 2, "batch_size": 8, "progress": False, "checkpoint": file}
    first = train_denoiser(DATA, **options)
    rewritten(file, lambda meta, tensors: [meta["config"].pop("checksums"), meta.pop("device"), meta.pop("optimizers")])
    assert states_equal(train_denoiser(DATA, resume=True, **options).state_dict(), first.state_dict())


# ---------------------------------------------------------------------- signals

@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", None)])
def test_signals_finish_the_step_save_and_end(tmp_path, name, code):
    """As the first Ctrl-C does; the exit code is a shell's, and handlers are put back."""
    file, number = tmp_path / "run.safetensors", getattr(signal, name)
    before = signal.getsignal(number)

    def update(state):
        if state.step == 4:
            signal.raise_signal(number)
        return toy_update(state)

    with pytest.raises(KeyboardInterrupt if code is None else training.Terminated) as caught:
        training.fit(toy_state(), update, 50, progress=False, checkpoint=file)
    assert str(caught.value) == f"stopped at step 5 of 50; saved in {file}"
    assert getattr(caught.value, "code", None) == code
    assert training.progress_of(file)["step"] == 5
    assert signal.getsignal(number) is before


def test_only_a_second_ctrl_c_cuts_a_step_short(monkeypatch):
    clock = itertools.count(step=10.0)
    monkeypatch.setattr(training.signals.time, "monotonic", lambda: next(clock))
    with training.signals.asked_to_stop() as asked:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGHUP):
            signal.raise_signal(number)
        assert asked.number == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_hangup_that_nohup_has_ignored_stays_ignored(tmp_path):
    def update(state):
        signal.raise_signal(signal.SIGHUP)
        return toy_update(state)

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert training.fit(toy_state(), update, 3, progress=False).step == 3
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("seconds", "asked"), [(0.01, [1, 6, 11, 16]), (0.9, [1, 3, 5, 7, 9]), (6.0, [1, 2, 3, 4, 5])])
def test_several_processes_agree_by_time(monkeypatch, seconds, asked):
    """With steps of 6 s each one: a launcher that waits for 30 s is not kept waiting for five of them."""
    clock, seen = [0.0], []
    monkeypatch.setattr(loop.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(parallel, "world", lambda: 2)
    monkeypatch.setattr(parallel, "largest", lambda values, device: seen.append(step) or values)
    state = toy_state()
    ending = loop._Ending(training.signals.Asked(), None, state)
    for step in range(1, 17 if seconds < 0.1 else 10 if seconds < 1 else 6):
        clock[0] += seconds
        ending.now(step, last=False)
    assert seen == asked


# ---------------------------------------------------------------------- explosions

def exploding_update(at):
    """Plain descent on w^2; the update of the step `at` throws the weights to 1e30, after which gradients overflow."""
    def update(state):
        net, optimizer = state.modules["net"], state.optimizers["net"]
        loss = net(torch.ones(1, 2)).square().sum()
        skipped = training.optimizer_step(loss, optimizer)
        if state.step + 1 == at:
            with torch.no_grad():
                net.weight.fill_(1e30)
        return {"loss": loss.detach(), "skipped": skipped}

    return update


def test_the_last_good_state_is_kept_while_updates_are_skipped(tmp_path):
    file = tmp_path / "run.safetensors"
    with pytest.raises(FloatingPointError, match="updates in a row were skipped"):
        training.fit(toy_state(), exploding_update(55), 500, progress=False, checkpoint=file, checkpoint_every=10)
    assert training.progress_of(file)["step"] == 50


@pytest.mark.parametrize("end", ["steps", "signal"])
def test_nor_does_the_end_of_an_exploded_run_replace_it(tmp_path, end):
    file, inner = tmp_path / "run.safetensors", exploding_update(55)

    def update(state):
        if end == "signal" and state.step == 59:
            signal.raise_signal(signal.SIGTERM)
        return inner(state)

    error = FloatingPointError if end == "steps" else training.Terminated
    with pytest.raises(error) as caught:
        training.fit(toy_state(), update, 60 if end == "steps" else 500, progress=False, checkpoint=file,
                     checkpoint_every=10)
    assert "5 updates" in str(caught.value)
    assert training.progress_of(file)["step"] == 50


def test_one_skipped_update_at_the_end_does_not_cost_the_run(tmp_path):
    """Its loss was finite: the weights, which it left alone, are good."""
    file = tmp_path / "run.safetensors"

    def update(state):
        losses = toy_update(state)
        return losses | {"skipped": torch.tensor(float(state.step == 29))}

    assert training.fit(toy_state(), update, 30, progress=False, checkpoint=file).skipped == 1
    assert training.progress_of(file)["step"] == 30


@pytest.mark.parametrize("saved", [True, False])
def test_weights_are_looked_at_after_the_last_update(tmp_path, saved):
    """A finite loss says nothing of the weights that the step left behind."""
    file, data = tmp_path / "run.safetensors", small_ring().sample(64, torch.Generator().manual_seed(0))
    options = {"batch_size": 8, "progress": False, "checkpoint": file if saved else None}
    if saved:
        before = (train_denoiser(data, steps=1, **options), file.read_bytes())[1]
    with pytest.raises(FloatingPointError, match=r"after step 1 \(try a lower learning rate\): net\.network\."):
        train_denoiser(data, steps=1, learning_rate=1e42, **options)
    assert not saved or file.read_bytes() == before


def test_a_run_of_which_most_updates_were_skipped_ends_with_a_warning():
    def update(state):
        return toy_update(state) | {"skipped": torch.tensor(float(state.step % 3 != 2))}

    with pytest.warns(UserWarning, match="20 of 30 updates were skipped"):
        training.fit(toy_state(), update, 30, progress=False)


# ---------------------------------------------------------------------- a full disk

@pytest.fixture
def disk(monkeypatch):
    """`disk.full` says whether the next file can be written."""
    class Disk:
        full = False

    sync = os.fsync

    def fsync(descriptor):
        if Disk.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(files.os, "fsync", fsync)
    return Disk


def test_a_save_that_fails_is_warned_of_and_tried_again(tmp_path, disk):
    file = tmp_path / "run.safetensors"

    def callback(state):
        disk.full = state.step in (10, 15)

    with pytest.warns(UserWarning, match="could not be written") as warned:
        state = training.fit(toy_state(), toy_update, 20, progress=False, checkpoint=file, checkpoint_every=5,
                             callbacks=[callback], callback_every=5)
    assert state.step == 20
    assert [str(each.message) for each in warned] == [
        f"{file} could not be written at step {step} (No space left on device); the run goes on, and tries again at "
        "its next checkpoint" for step in (10, 15)]
    assert training.progress_of(file)["step"] == 20
    assert [path.name for path in tmp_path.iterdir()] == ["run.safetensors"]


def test_a_trained_model_comes_back_though_its_state_could_not_be_written(tmp_path, disk):
    file = tmp_path / "run.safetensors"
    disk.full = True
    with pytest.warns(UserWarning, match=r"run\.safetensors could not be written at step 5 .*; it is as it was before"):
        model = train_denoiser(DATA, steps=5, batch_size=8, progress=False, checkpoint=file)
    assert states_equal(model.state_dict(), train_denoiser(DATA, steps=5, batch_size=8, progress=False).state_dict())


@pytest.mark.parametrize("always", [False, True])
def test_a_callback_that_can_not_write_is_called_again(tmp_path, always):
    """An export, say. At the end the state comes first; then the error is raised."""
    file, seen = tmp_path / "run.safetensors", []

    def export(state):
        seen.append(state.step)
        if always or state.step == 10:
            raise OSError(errno.ENOSPC, "No space left on device", "model.safetensors")

    options = {"checkpoint": file, "callbacks": [export, lambda state: {"more": 1}], "callback_every": 5}
    raised = pytest.raises(OSError, match="No space left") if always else contextlib.nullcontext()
    with pytest.warns(UserWarning, match=r"a callback failed at step \d+ .*No space left.*; the run goes on"), raised:
        training.fit(toy_state(), toy_update, 20, progress=False, **options)
    progress = training.progress_of(file)
    assert (progress["step"], seen) == (20, [5, 10, 15, 20])
    assert [record["more"] for record in progress["history"]] == [1] * 4


def test_an_interrupted_run_says_that_it_could_not_be_saved(tmp_path, disk):
    file = tmp_path / "run.safetensors"

    def update(state):
        disk.full = state.step == 6
        if disk.full:
            signal.raise_signal(signal.SIGINT)
        return toy_update(state)

    with pytest.warns(UserWarning, match="could not be written"), pytest.raises(KeyboardInterrupt) as caught:
        training.fit(toy_state(), update, 50, progress=False, checkpoint=file, checkpoint_every=5)
    assert "stopped at step 7 of 50; not saved: " in str(caught.value)
    assert training.progress_of(file)["step"] == 5


# ---------------------------------------------------------------------- equal runs, equal files

@pytest.mark.parametrize("run", [teacher_run, distill_run])
def test_equal_runs_leave_equal_files_and_the_callers_random_numbers_alone(tmp_path, run):
    """Whatever the global generators were before; they are part of a state, since callbacks may draw from them."""
    made = []
    for number in (0, 1):
        random.seed(number)
        np.random.seed(number)  # noqa: NPY002
        before = (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
        file = tmp_path / f"{number}.safetensors"
        run(checkpoint=file)
        assert (random.getstate(), np.random.get_state()[1].tolist()) == before  # noqa: NPY002
        made.append(file.read_bytes())
    assert made[0] == made[1]


def test_numbers_drawn_in_callbacks_go_on_as_they_would_have(tmp_path):
    """`random` and NumPy in a resumed run, as in one that was never interrupted."""
    def run(**options):
        state, drawn = toy_state(), []
        training.fit(state, toy_update, options.pop("steps", 6), progress=False, callback_every=1,
                     callbacks=[lambda state: drawn.append((random.random(), np.random.rand()))],  # noqa: NPY002
                     **options)
        return drawn

    file, whole = tmp_path / "run.safetensors", run()
    assert run(steps=3, checkpoint=file) + run(checkpoint=file, resume=True) == whole


def test_a_finite_state_is_one_look_at_the_device(monkeypatch):
    """Not one for every tensor, each of which would wait for the device."""
    seen = []
    item = torch.Tensor.__bool__
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda self: seen.append(1) or item(self))
    state_module.check_state(training.State({"net": MLP((2,), hidden=8, depth=20)}, {}, torch.Generator()))
    assert len(seen) == 1
