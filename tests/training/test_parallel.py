"""One process or several: the same batch gives the same losses, a dead one ends the job, and any number resumes it.

The processes are real ones, started by torchrun with gloo on the CPU.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from minidistill import ring, training
from minidistill.cli import main
from minidistill.distillation import distill
from minidistill.networks import MLP, Denoiser
from minidistill.teachers import train_denoiser
from minidistill.training import checkpoints, parallel

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
TRAIN = ["train", "--batch-size", "32", "--steps", "20", "--log-every", "1", "--checkpoint-every", "4"]


def launch(*arguments, timeout=240):
    """Run torchrun; subprocess.run raises if the job outlives the timeout."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*TORCHRUN, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, timeout=timeout, capture_output=True, text=True)


def losses(out, *names):
    history = json.loads((out / "history.json").read_text())
    return [[record[name] for name in names] for record in history]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A U-Net on the digits, trained and distilled by one process."""
    out = tmp_path_factory.mktemp("alone")
    assert main([*TRAIN, "--data", "digits", "--preset", "tiny", "--out", str(out / "t")]) == 0
    return out


def test_two_processes_and_one_have_the_same_loss_curve(alone, tmp_path):
    done = launch("-m", "minidistill", *TRAIN, "--data", "digits", "--preset", "tiny", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("teacher in") == 1  # one of them speaks
    ours, wanted = losses(tmp_path, "loss"), losses(alone / "t", "loss")
    assert len(ours) == 20
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(wanted), rtol=1e-5, atol=1e-5)
    a, b = (checkpoints.read(out / "teacher.safetensors")[0] for out in (tmp_path, alone / "t"))
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], rtol=1e-2, atol=1e-3)


def test_a_dead_process_ends_the_job_and_one_process_finishes_it(alone, tmp_path):
    """SIGKILL of process 1 at step 12: torchrun returns non-zero by itself, within its timeout here of a minute and the
    start of the processes; the checkpoint of step 12 or before is whole, and one process goes on to the same end."""
    arguments = [*TRAIN, "--data", "digits", "--preset", "tiny", "--out", str(tmp_path)]
    done = launch("tests/training/dying_rank.py", *arguments, timeout=150)
    assert done.returncode != 0
    assert not (tmp_path / "teacher.safetensors").exists()
    step = training.progress_of(tmp_path / "training.safetensors")["step"]
    assert step in (8, 12)
    assert main([*arguments, "--resume"]) == 0
    ours, wanted = losses(tmp_path, "loss"), losses(alone / "t", "loss")
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(wanted), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("objective", ["reverse_kl", "sid"])
def test_distillation_in_two_processes(objective, alone, tmp_path):
    """Both losses of an image distillation agree, with several critic steps and accumulated pieces."""
    arguments = ["distill", "--teacher", str(alone / "t" / "teacher.safetensors"), "--objective", objective,
                 "--steps", "8", "--batch-size", "16", "--log-every", "1", "--learning-rate", "1e-4",
                 "--critic-learning-rate", "1e-4", "--critic-steps", "2", "--accumulate", "2"]
    done = launch("-m", "minidistill", *arguments, "--out", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    assert main([*arguments, "--accumulate", "1", "--out", str(tmp_path / "one")]) == 0
    for name in ("critic", "generator"):
        two, one = (torch.tensor(losses(tmp_path / out, name)) for out in ("two", "one"))
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-4 * float(one.abs().max()))


def test_jumps_in_two_processes(alone, tmp_path):
    """Mean flow's forward derivative is of the bare network, and its losses agree; flow_map's carries a gradient, and
    says what it wants."""
    arguments = ["distill", "--teacher", str(alone / "t" / "teacher.safetensors"), "--objective", "mean_flow",
                 "--steps", "4", "--batch-size", "16", "--log-every", "1", "--learning-rate", "1e-4"]
    done = launch("-m", "minidistill", *arguments, "--out", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    assert main([*arguments, "--out", str(tmp_path / "one")]) == 0
    two, one = (torch.tensor(losses(tmp_path / out, "generator")) for out in ("two", "one"))
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-4 * float(one.abs().max()))
    refused = launch("-m", "minidistill", *("flow_map" if word == "mean_flow" else word for word in arguments),
                     "--out", str(tmp_path / "no"))
    assert refused.returncode != 0
    assert "wanted FlowMap(difference=0.01)" in refused.stderr


def test_a_batch_in_pieces_gives_the_same_network():
    data = ring().sample(200, torch.Generator().manual_seed(0))
    whole, pieces = (train_denoiser(data, steps=5, batch_size=24, accumulate=k, progress=False) for k in (1, 3))
    for a, b in zip(whole.parameters(), pieces.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    one, two = (distill(ring(), steps=4, batch_size=24, accumulate=k, progress=False) for k in (1, 2))
    torch.testing.assert_close(one.sample(50), two.sample(50), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("world", "rank", "accumulate"), [(1, 0, 1), (1, 0, 4), (2, 1, 1), (4, 2, 3)])
def test_parts_cover_a_batch_once(world, rank, accumulate, monkeypatch):
    seen = []
    monkeypatch.setattr(parallel, "world", lambda: world)
    for each in range(world):
        monkeypatch.setattr(parallel, "rank", lambda each=each: each)
        mine = parallel.parts(48, accumulate)
        assert len(mine) == accumulate
        seen += [i for part in mine for i in range(48)[part]]
    assert seen == list(range(48))
    with pytest.raises(ValueError, match=r"batch_size=47"):
        parallel.parts(47, 2 * accumulate)


@pytest.mark.parametrize("given", ["soon", "0", "-3", "inf", "nan"])
def test_a_time_out_that_is_none_is_named(given, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MINIDISTILL_TIMEOUT", given)
    with pytest.raises(ValueError, match=f"MINIDISTILL_TIMEOUT='{given}': wanted a number of seconds > 0"):
        parallel.start("cpu")
    with pytest.raises(ValueError, match=r"timeout=-1\.0: wanted"):
        parallel.start("cpu", timeout=-1.0)


def test_alone_nothing_is_wrapped_or_summed():
    module = nn.Linear(1, 1)
    assert parallel.wrap(module) is module
    assert parallel.world() == 1
    assert parallel.rank() == 0
    assert parallel.total(torch.tensor(3.0)) == 3
    assert parallel.any_of(True, torch.device("cpu"))
    assert not parallel.any_of(False, torch.device("cpu"))
    assert parallel.start("cpu") == torch.device("cpu")


@pytest.mark.parametrize("fused", [True, False])
def test_an_update_with_a_bad_gradient_is_skipped_whole(fused):
    """Weights, moments and the optimizer's own count stay what they were; the next good update goes on."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(layer.parameters(), 0.1, fused=fused)
    x = torch.ones(1, 3)
    assert training.optimizer_step(layer(x).sum(), optimizer, 1.0) == 0
    before = [p.detach().clone() for p in layer.parameters()]
    slots = {k: {s: v.clone() for s, v in slot.items()} for k, slot in optimizer.state_dict()["state"].items()}
    for bad in (float("nan"), float("inf")):
        assert training.optimizer_step(layer(x * bad).sum(), optimizer, 1.0) == 1
        assert all(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))
        for k, slot in optimizer.state_dict()["state"].items():
            assert all(torch.equal(value, slots[k][s]) for s, value in slot.items())
    assert training.optimizer_step(layer(x).sum(), optimizer, 1.0) == 0
    assert not torch.equal(before[0], layer.weight)


def bad_update(when):
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.Adam([weight], 0.01, fused=True)

    def update(state):
        factor = float("nan") if when(state.step) else 1.0
        loss = (factor * weight.square()).sum()
        return {"loss": loss.detach(), "skipped": training.optimizer_step(loss, optimizer)}

    return update


def test_skipped_updates_are_counted_and_many_in_a_row_end_the_run(tmp_path):
    file = tmp_path / "state.safetensors"
    state = training.State({}, {}, torch.Generator())
    training.fit(state, bad_update(lambda step: step in (3, 9, 24)), 30, log_every=5, progress=False, checkpoint=file)
    assert state.skipped == 3
    assert [record.get("skipped") for record in state.history] == [1, 2, 2, 2, 3, 3]
    assert "loss" not in state.history[1]  # step 10 was skipped, so there is no loss to tell
    assert training.progress_of(file)["skipped"] == 3
    state = training.State({}, {}, torch.Generator())
    with pytest.raises(FloatingPointError, match=r"not finite at step 30 \(25 updates in a row were skipped\)"):
        training.fit(state, bad_update(lambda step: step >= 5), 200, log_every=10, progress=False)


def test_bfloat16_trains_as_float32_does_and_keeps_its_weights_in_float32():
    data = ring().sample(500, torch.Generator().manual_seed(0))
    settings = {"steps": 200, "batch_size": 64, "progress": False}
    both = [train_denoiser(data, MLP((2,), hidden=32), speed=training.Speed(name), **settings)
            for name in ("float32", "bfloat16")]
    assert all(p.dtype == torch.float32 for p in both[1].parameters())
    x, sigma = 2 * torch.randn(200, 2, generator=torch.Generator().manual_seed(1)), torch.tensor(1.0)
    exact, full, half = [model(x, sigma) for model in (ring(), *both)]
    assert not torch.equal(full, half)
    # bfloat16 has 8 bits: its rounding of the network's output is far smaller than what 200 steps leave to learn.
    assert (full - half).square().mean() < 0.2 * (full - exact).square().mean()
    out = distill(both[1], objective="sid", steps=20, batch_size=32, speed=training.Speed("bfloat16"), progress=False)
    assert torch.isfinite(out.sample(100)).all()


def test_the_networks_compute_in_the_precision_asked_for():
    seen = []
    model = Denoiser(MLP((2,), hidden=8), 1.0)
    model.network.outward.register_forward_hook(lambda module, given, out: seen.append(out.dtype))
    training.Speed("bfloat16").apply(model)
    assert model(torch.zeros(3, 2), 1.0).dtype == torch.float32
    training.Speed().apply(model)
    model(torch.zeros(3, 2), 1.0)
    assert seen == [torch.bfloat16, torch.float32]
    with pytest.raises(ValueError, match=r"precision='half'"):
        training.Speed("half").apply(model)
    with pytest.raises(ValueError, match=r"compile='fast'"):
        training.Speed(compile="fast").apply(model)


def test_minutes_end_a_run_early_with_a_checkpoint_that_goes_on(tmp_path):
    file = tmp_path / "state.safetensors"
    state = training.State({}, {}, torch.Generator())
    options = {"progress": False, "checkpoint": file, "batch_size": 4}
    training.fit(state, bad_update(lambda step: False), 10**9, minutes=1e-3, **options)
    assert 0 < state.step < 10**9
    assert state.history[-1]["images"] == 4 * state.step
    assert training.progress_of(file)["step"] == state.step
    again = training.State({}, {}, torch.Generator())
    training.fit(again, bad_update(lambda step: False), 10**9, minutes=1e-4, resume=True, **options)
    assert again.step > state.step
