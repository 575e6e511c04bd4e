"""Checkpoints, exact resume, kills and interrupts, EMA, schedule, clipping, and files that are refused."""

import copy
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from minidistill import training
from minidistill.distillation import distill
from minidistill.networks import MLP, Denoiser, Generator
from minidistill.networks.unet import UNet
from minidistill.teachers import train_denoiser
from minidistill.training import checkpoints
from tests.helpers import clone_state, normal, small_denoiser, small_ring, states_equal

ROOT = Path(__file__).parents[2]
STEPS = 30


class Stop(Exception):
    """Raised by a callback, as a crash would be."""


def crash_at(step):
    def callback(state):
        if state.step == step:
            raise Stop

    return callback


def teacher_run(steps=STEPS, **options):
    data = small_ring().sample(64, torch.Generator().manual_seed(0))
    torch.manual_seed(9)
    network = MLP((2,), hidden=8, depth=1)
    return train_denoiser(data, network, **{"steps": steps, "batch_size": 16, "progress": False, **options})


def distill_run(objective="jensen_shannon", **options):
    crash = options.pop("crash", None)
    calls = iter(range(1, 1000))

    def evaluate(generator):
        if next(calls) == crash:
            raise Stop
        return {"size": float(sum(p.square().sum() for p in generator.parameters()))}

    torch.manual_seed(9)
    generator = Generator(Denoiser(MLP((2,), hidden=8, depth=1), 1.0), 2.0)
    settings = {"steps": STEPS, "batch_size": 16, "progress": False, "evaluate": evaluate, "evaluate_every": 1}
    return distill(small_ring(), generator, objective, **{**settings, **options})


@pytest.mark.parametrize("crash", [1, 6, 17, 29])
def test_a_resumed_teacher_equals_an_uninterrupted_one_to_the_bit(tmp_path, crash):
    file = tmp_path / "run.safetensors"
    with pytest.raises(Stop):
        teacher_run(checkpoint=file, checkpoint_every=5, callbacks=[crash_at(crash)], callback_every=1)
    torch.manual_seed(123)  # the resumed process knows nothing of the first one's random state
    assert states_equal(teacher_run(checkpoint=file, resume=True).state_dict(), teacher_run().state_dict())


@pytest.mark.parametrize("objective", ["jensen_shannon", "reverse_kl", "sid"])
def test_a_resumed_distillation_equals_an_uninterrupted_one_to_the_bit(tmp_path, objective):
    file, whole = tmp_path / "run.safetensors", distill_run(objective)
    with pytest.raises(Stop):
        distill_run(objective, checkpoint=file, checkpoint_every=7, crash=17)
    resumed = distill_run(objective, checkpoint=file, checkpoint_every=7, resume=True)
    for name in ("generator", "ema", "fake", "ratio"):
        if getattr(whole, name) is not None:
            assert states_equal(getattr(resumed, name).state_dict(), getattr(whole, name).state_dict()), name
    assert [record["step"] for record in resumed.history] == [record["step"] for record in whole.history]
    assert resumed.history[-1] == whole.history[-1]


def test_resuming_a_finished_run_gives_it_back(tmp_path):
    file = tmp_path / "run.safetensors"
    first = teacher_run(checkpoint=file)
    before = file.read_bytes()
    assert states_equal(teacher_run(checkpoint=file, resume=True).state_dict(), first.state_dict())
    assert file.read_bytes() == before


SCRIPT = """
import sys, time
from tests.training.test_training import teacher_run
teacher_run({steps}, checkpoint=sys.argv[1], checkpoint_every={every},
            callbacks=[lambda s: time.sleep(0.01)], callback_every=1)
"""


def start_child(file, steps, every):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    code = SCRIPT.format(steps=steps, every=every)
    return subprocess.Popen([sys.executable, "-c", code, str(file)], cwd=ROOT, env=environment,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def saved_step(file):
    if not file.exists():
        return 0
    data = file.read_bytes()  # in one go: another process may be replacing the file
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return json.loads(header["__metadata__"]["state"])["step"]


def stop_child(child, file, step, how):
    """Send the signal once the file on disk, which must be readable at all times, has reached the step."""
    for _ in range(6000):
        if child.poll() is not None or saved_step(file) >= step:
            break
        time.sleep(0.01)
    assert child.poll() is None, child.stderr.read().decode()
    child.send_signal(how)
    _, error = child.communicate(timeout=60)
    return error.decode()


@pytest.mark.parametrize(("kill_at", "every"), [(1, 1), (random.Random(0).randrange(20, 60), 3), (90, 1)])
def test_a_killed_run_resumes_to_the_same_bits(tmp_path, kill_at, every):
    """SIGKILL at whatever instant: the file is whole and the resumed run ends as if nothing had happened."""
    file, steps = tmp_path / "run.safetensors", 200
    child = start_child(file, steps, every)
    stop_child(child, file, kill_at, signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    assert kill_at <= saved_step(file) < steps
    resumed = teacher_run(steps, checkpoint=file, checkpoint_every=50, resume=True)
    assert states_equal(resumed.state_dict(), teacher_run(steps).state_dict())


def test_interrupt_of_a_process_saves_the_step_it_finished(tmp_path):
    file, steps = tmp_path / "run.safetensors", 200
    child = start_child(file, steps, 20)
    error = stop_child(child, file, 20, signal.SIGINT)
    assert child.returncode != 0
    assert "KeyboardInterrupt: stopped at step" in error
    assert 20 <= saved_step(file) < steps
    resumed = teacher_run(steps, checkpoint=file, resume=True)
    assert states_equal(resumed.state_dict(), teacher_run(steps).state_dict())


def toy_state(value=1.0):
    module = nn.Linear(2, 1, bias=False)
    nn.init.constant_(module.weight, value)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    return training.State({"net": module}, {"net": optimizer}, torch.Generator().manual_seed(0), {"run": "toy"})


def toy_update(state):
    loss = state.modules["net"](torch.ones(1, 2)).square().sum()
    training.optimizer_step(loss, state.optimizers["net"])
    return {"loss": loss.detach()}


@pytest.mark.parametrize("where", [
    "update",
    "callback",
])
def test_interrupt_saves_the_step_that_its_message_names(tmp_path, where):
    """Whether Ctrl-C comes during a step or during a callback, what the message says is in the file."""
    file, before = tmp_path / "run.safetensors", signal.getsignal(signal.SIGINT)

    def interrupting(state):
        if where == "update" and state.step == 4:
            signal.raise_signal(signal.SIGINT)
        return toy_update(state)

    def callback(state):
        if where == "callback" and state.step == 5:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as caught:
        training.fit(toy_state(), interrupting, 50, progress=False, checkpoint=file, callbacks=[callback],
                     callback_every=1)
    assert f"stopped at step {saved_step(file)} of 50; saved in" in str(caught.value)
    assert saved_step(file) in (5, 6)
    assert signal.getsignal(signal.SIGINT) is before


def test_checkpoint_round_trip_is_exact(tmp_path):
    """Weights, optimizer state, generators, step and history all come back, in their own dtypes."""
    file = tmp_path / "state.safetensors"

    def make(seed):
        torch.manual_seed(seed)
        net = MLP((2,), hidden=8, depth=1)
        optimizer = torch.optim.Adam(net.parameters(), 1e-3 * (seed + 1), fused=True)
        state = training.State({"net": net}, {"net": optimizer}, torch.Generator().manual_seed(seed), {"a": [1, 2]})
        training.optimizer_step(net(torch.randn(4, 2), torch.zeros(4)).square().sum(), optimizer)
        return state

    saved, other = make(0), make(1)
    saved.step, saved.history = 12, [{"step": 12, "loss": 0.1}]
    training.save_state(file, saved)
    wanted = (torch.rand(3), torch.rand(3, generator=saved.rng), random.random())
    training.load_state(file, other)
    assert torch.equal(torch.rand(3), wanted[0])
    assert torch.equal(torch.rand(3, generator=other.rng), wanted[1])
    assert random.random() == wanted[2]
    assert (other.step, other.history) == (12, saved.history)
    assert states_equal(other.modules["net"].state_dict(), saved.modules["net"].state_dict())
    a, b = saved.optimizers["net"].state_dict(), other.optimizers["net"].state_dict()
    assert json.dumps(a["param_groups"]) == json.dumps(b["param_groups"])  # JSON has no tuples: betas may be a list
    for index, slots in a["state"].items():
        for slot, value in slots.items():
            assert torch.equal(value, b["state"][index][slot])


def flip_a_byte(file):
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


DAMAGE = {
    "flipped": (flip_a_byte, "corrupt"),
    "cut in half": (lambda f: f.write_bytes(f.read_bytes()[: f.stat().st_size // 2]), "truncated"),
    "one byte short": (lambda f: f.write_bytes(f.read_bytes()[:-1]), "truncated"),
    "empty": (lambda f: f.write_bytes(b""), "truncated"),
    "text": (lambda f: f.write_text("not a checkpoint"), "truncated or not a safetensors file"),
    "foreign": (lambda f: save_file({"net.weight": torch.zeros(1, 2)}, f), "not written by minidistill"),
    "model": (lambda f: checkpoints.save_model(f, small_denoiser()), "holds a denoiser; wanted a training"),
}


def assert_refused(file, state, message):
    before = clone_state(state.modules["net"])
    with pytest.raises(ValueError, match=message) as caught:
        training.load_state(file, state)
    assert str(file) in str(caught.value)
    assert states_equal(state.modules["net"].state_dict(), before)
    assert (state.step, state.history) == (0, [])


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_and_foreign_files_are_refused_and_nothing_changes(tmp_path, name):
    file = tmp_path / "state.safetensors"
    damage, message = DAMAGE[name]
    training.save_state(file, toy_state(1.0))
    damage(file)
    assert_refused(file, toy_state(2.0), message)


def test_another_architecture_or_config_is_refused(tmp_path):
    file = tmp_path / "state.safetensors"
    training.save_state(file, toy_state(1.0))
    other = toy_state(2.0)
    other.modules["net"] = nn.Linear(3, 1)
    assert_refused(file, other, r"net\.(weight|bias) has shape")
    other = toy_state(2.0)
    other.config = {"run": "another"}
    assert_refused(file, other, "run was 'toy' and is now 'another'")


def test_resume_with_other_arguments_is_refused(tmp_path):
    file = tmp_path / "run.safetensors"
    teacher_run(checkpoint=file)
    with pytest.raises(ValueError, match="learning_rate was"):
        teacher_run(checkpoint=file, resume=True, learning_rate=1e-3)


def test_atomic_keeps_the_old_file_when_the_block_raises(tmp_path):
    file = tmp_path / "deep" / "file.txt"
    with checkpoints.atomic(file) as name:
        name.write_text("old")

    def fail():
        with checkpoints.atomic(file) as name:
            name.write_text("half")
            raise Stop

    with pytest.raises(Stop):
        fail()
    assert file.read_text() == "old"
    assert [entry.name for entry in file.parent.iterdir()] == ["file.txt"]


def test_an_unwritable_place_is_refused_before_training(tmp_path):
    calls: list[int] = []

    def update(state):
        calls.append(1)
        return toy_update(state)

    (tmp_path / "file").write_text("in the way")
    for target, error in ((tmp_path / "file" / "run.safetensors", OSError), (tmp_path, IsADirectoryError)):
        with pytest.raises(error):
            training.fit(toy_state(), update, 5, progress=False, checkpoint=target)
    assert not calls
    assert (tmp_path / "file").read_text() == "in the way"


NETS = {
    "mlp": lambda: MLP((2,), hidden=8, depth=2, n_classes=3, activation="relu"),
    "unet": lambda: UNet((1, 8, 8), channels=8, blocks=1, attention=(4,), n_classes=3),
}


@pytest.mark.parametrize("generator", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_saved_models_come_back_whole(tmp_path, name, generator):
    file = tmp_path / "model.safetensors"
    torch.manual_seed(0)
    denoiser = Denoiser(NETS[name](), 0.8)
    for parameter in denoiser.parameters():
        nn.init.normal_(parameter, std=0.1)
    model = Generator(denoiser, 2.5) if generator else denoiser
    checkpoints.save_model(file, model, note="hello", numbers=[1, 2])
    loaded, info = checkpoints.load_model(file)
    assert type(loaded) is type(model)
    assert not loaded.training
    assert info == {"note": "hello", "numbers": [1, 2]}
    x, label = torch.randn(3, *model.shape), torch.arange(3)
    arguments = (x, label) if generator else (x, 0.4, label)
    assert torch.equal(loaded(*arguments), model.eval()(*arguments))


def test_bad_model_files_are_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    with pytest.raises(FileNotFoundError, match="no such file"):
        checkpoints.load_model(file)
    training.save_state(file, toy_state())
    with pytest.raises(ValueError, match="holds a training; wanted a denoiser or a generator"):
        checkpoints.load_model(file)
    checkpoints.save_model(file, small_denoiser())
    flip_a_byte(file)
    with pytest.raises(ValueError, match="corrupt"):
        checkpoints.load_model(file)


def holding(*values, dtype=torch.float32):
    """A module whose one parameter has these values."""
    module = nn.Module()
    module.weight = nn.Parameter(torch.tensor(values, dtype=dtype))
    return module


@pytest.mark.parametrize("step", [0, 10, 100_000])
def test_ema_formula(step):
    """ema <- model + d (ema - model), d = 2^(-batch / min(halflife, seen / 20))."""
    ema, model = holding(1.0, 2.0), holding(3.0, -1.0)
    halflife, batch = 1000.0, 64
    decay = 0.5 ** (batch / min(halflife, 0.05 * (step + 1) * batch))
    wanted = model.weight + decay * (ema.weight - model.weight)
    training.update_ema(ema, model, halflife, batch, step)
    torch.testing.assert_close(ema.weight, wanted)
    assert model.weight.tolist() == [3.0, -1.0]


def test_ema_forgets_half_in_one_halflife():
    ema, model = holding(1.0, dtype=torch.float64), holding(0.0, dtype=torch.float64)
    for step in range(10):
        training.update_ema(ema, model, 640.0, 64, 10_000 + step)
    assert ema.weight.tolist() == pytest.approx([0.5], rel=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_ema_is_lerp_to_the_bit(dtype):
    """What a seed gives must not depend on which of torch's functions averages."""
    for step in (0, 3, 500):
        old, new = (holding(*normal(50, seed=seed).tolist(), dtype=dtype) for seed in (step, step + 1))
        wanted = old.weight.detach().clone().lerp_(new.weight, 1 - 0.5 ** (64 / min(1000.0, 3.2 * (step + 1))))
        training.update_ema(old, new, 1000.0, 64, step)
        assert torch.equal(old.weight, wanted)


class Normalised(nn.Module):
    """F(x, c_noise, label) with a batch normalisation, of points in the plane."""

    shape, n_classes, config = (2,), 0, {"kind": "normalised"}

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 64), nn.BatchNorm1d(64), nn.SiLU(), nn.Linear(64, 2))

    def forward(self, x, c_noise, label=None):
        return self.layers(torch.cat([20 * x, c_noise[:, None]], 1))  # far from unit variance


def test_buffers_are_averaged_too():
    model = Normalised().train()
    ema = copy.deepcopy(model).eval()
    norm, average = model.layers[1], ema.layers[1]
    with torch.no_grad():
        norm.running_mean.fill_(4.0)
        norm.num_batches_tracked.fill_(7)
    training.update_ema(ema, model, 1e9, 64, 10_000)
    decay = 0.5 ** (64 / (0.05 * 10_001 * 64))
    torch.testing.assert_close(average.running_mean, torch.full((64,), 4 * (1 - decay)))
    assert int(average.num_batches_tracked) == 7


def test_an_average_with_batch_norm_denoises_as_its_network_does():
    """With the initial running statistics it is worse than answering 0 (mean square error 0.5 of the data's)."""
    torch.manual_seed(0)
    x0 = 0.5 * normal(4000, 2, dtype=torch.float32)
    network = Normalised()
    ema = train_denoiser(x0, network, steps=300, seed=0, progress=False)
    live = Denoiser(network, ema.sigma_data).eval()
    x = x0 + 0.5 * normal(4000, 2, seed=1, dtype=torch.float32)
    wrong, right = (float((model(x, 0.5) - x0).square().mean().detach()) for model in (ema, live))
    assert right < 0.2
    assert wrong == pytest.approx(right, rel=0.1)


def test_a_students_average_has_its_running_statistics():
    torch.manual_seed(0)
    start = Generator(Denoiser(Normalised(), 0.7), 0.5)
    student = distill(small_ring(), start, steps=30, batch_size=64, progress=False)
    live, average = (each.denoiser.network.layers[1].running_var for each in (student.generator, student.ema))
    assert (live - 1).abs().mean() > 1
    assert (average - live).abs().mean() < 0.1 * (live - 1).abs().mean()


def test_schedule_rises_holds_and_falls_to_zero():
    factors = [training.schedule(step, 100, warmup=10, hold=0.4) for step in range(101)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10:41] == pytest.approx([1.0] * 31)
    assert factors[41:] == pytest.approx([(100 - i) / 60 for i in range(41, 101)])
    assert training.schedule(0, 100) == 1


@pytest.mark.parametrize(("clip", "length"), [(0.5, 0.5), (None, 5.0), (100.0, 5.0)])
def test_optimizer_step_clips_the_gradients_norm(clip, length):
    weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = torch.optim.SGD([weight], 1.0)
    training.optimizer_step(weight @ torch.tensor([3.0, 4.0], dtype=torch.float64), optimizer, clip)
    assert float(weight.detach().norm()) == pytest.approx(length, rel=1e-5)
    direction = -torch.tensor([0.6, 0.8], dtype=torch.float64)
    torch.testing.assert_close(weight.detach() / length, direction, rtol=1e-5, atol=0)


def test_optimizer_step_leaves_other_networks_gradients_alone():
    mine, other = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    training.optimizer_step((mine * other).sum(), torch.optim.SGD([mine], 0.1))
    assert other.grad is None
    assert float(mine.detach()) == pytest.approx(0.9)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_loss_stops_and_leaves_the_last_checkpoint(tmp_path, bad):
    file = tmp_path / "run.safetensors"

    def update(state):
        return toy_update(state) if state.step < 7 else {"loss": torch.tensor(bad)}

    with pytest.raises(FloatingPointError, match="loss is not finite at step 10"):
        training.fit(toy_state(), update, 40, progress=False, checkpoint=file, checkpoint_every=5, log_every=100)
    assert saved_step(file) == 5
    training.load_state(file, toy_state())


def test_history_holds_losses_and_what_callbacks_return():
    state = training.fit(toy_state(), toy_update, 12, progress=False, log_every=5, callback_every=4,
                         callbacks=[lambda state: {"twice": 2.0 * state.step}, lambda state: None])
    assert [record["step"] for record in state.history] == [4, 5, 8, 10, 12]
    assert [record.get("twice") for record in state.history] == [8.0, None, 16.0, None, 24.0]
    assert ["loss" in record for record in state.history] == [False, True, False, True, True]


DATA = torch.randn(10, 2, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"data": DATA[:, 0]}, ValueError, "data has shape"),
    ({"data": DATA[:1]}, ValueError, "data has 1 samples"),
    ({"data": DATA / 0}, ValueError, "data holds a NaN or infinite"),
    ({"data": DATA.long()}, TypeError, "data is a tensor of torch.int64"),
    ({"labels": torch.zeros(9).long()}, ValueError, "labels is"),
    ({"labels": -torch.ones(10).long()}, ValueError, "labels runs from -1"),
    ({"network": nn.Linear(2, 2)}, TypeError, "network is Linear"),
    ({"network": MLP((3,))}, ValueError, "network takes samples of shape"),
    ({"network": MLP((2,), n_classes=2)}, ValueError, "network has 2 classes"),
    ({"steps": 0}, ValueError, "steps=0"),
    ({"batch_size": 1.5}, ValueError, "batch_size=1.5"),
    ({"learning_rate": -1.0}, ValueError, "learning_rate=-1.0"),
    ({"clip": 0.0}, ValueError, "clip=0.0"),
    ({"ema_halflife": float("inf")}, ValueError, "ema_halflife=inf"),
    ({"seed": -1}, ValueError, "seed=-1"),
    ({"checkpoint_every": 0}, ValueError, "checkpoint_every=0"),
])
def test_bad_arguments_are_named_before_a_file_is_written(tmp_path, change, error, message):
    arguments = {"data": DATA, "steps": 2, "progress": False, "checkpoint": tmp_path / "run.safetensors", **change}
    with pytest.raises(error, match=message):
        train_denoiser(**arguments)
    assert not list(tmp_path.iterdir())


def test_a_changed_header_is_noticed(tmp_path):
    """The checksum covers the text beside the tensors too: one digit of the step is enough."""
    file = tmp_path / "state.safetensors"
    training.save_state(file, toy_state())
    data = file.read_bytes()
    assert data.count(b'\\"step\\": 0') == 1
    file.write_bytes(data.replace(b'\\"step\\": 0', b'\\"step\\": 7'))
    with pytest.raises(ValueError, match="corrupt"):
        training.load_state(file, toy_state())


def test_float64_data_trains_a_float32_network():
    """Data of another precision is brought to the networks' own before training."""
    data = torch.randn(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    denoiser = train_denoiser(data, steps=2, batch_size=8, progress=False)
    assert next(denoiser.parameters()).dtype == torch.float32


@pytest.mark.parametrize("size", [0.5, 4.0])
def test_noise_levels_in_training_scale_with_the_data(size):
    """ln sigma ~ N(-1.2, 1.2^2) for data of EDM's standard deviation, 0.5, and for others times their size: mean and
    standard deviation of one batch within 4 standard errors."""
    seen = []

    class Listening(MLP):
        def forward(self, x, c_noise, label=None):
            seen.append(4 * c_noise.detach())  # ln sigma
            return super().forward(x, c_noise, label)

    data, n = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0)), 20_000
    data = size * data / data.std()
    train_denoiser(data, Listening((2,), hidden=8, depth=1), steps=1, batch_size=n, progress=False)
    log_sigma = torch.cat(seen)
    assert log_sigma.shape == (n,)
    assert abs(float(log_sigma.mean()) - (-1.2 + math.log(size / 0.5))) < 4 * 1.2 / math.sqrt(n)
    assert abs(float(log_sigma.std()) - 1.2) < 4 * 1.2 / math.sqrt(2 * n)
