"""Learning rates that are far too high: an error, or a finite model; never a file with NaN in it, never a false "0"."""

import warnings

import pytest
import torch

from minidistill.cli import main
from minidistill.training import checkpoints


@pytest.mark.parametrize("program", ["train", "distill"])
def test_a_rate_that_is_too_high_leaves_no_bad_file(program, tmp_path, times, tally, capsys):
    command = {"train": ["train", "--data", "ring"], "distill": ["distill", "--teacher", "ring"]}[program]
    rates, lost = [10.0**k for k in times(range(6, 43, 12), range(0, 43))], 0
    for steps in times((1, 8), (1, 8, 60)):
        for number, rate in enumerate(rates):
            out = tmp_path / f"{steps}-{number}"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of updates that were skipped
                code = main([*command, "--steps", str(steps), "--batch-size", "8", "--learning-rate", str(rate),
                             "--checkpoint-every", "3", "--out", str(out)])
            files = list(out.rglob("*.safetensors"))
            for file in files:
                tensors = checkpoints.read(file)[0].values()
                lost += not all(bool(x.isfinite().all()) for x in tensors if x.is_floating_point())
            made = [file for file in files if file.name != "training.safetensors"]
            lost += (code == 0) != bool(made) and "were skipped" not in capsys.readouterr().err
    assert torch.get_default_dtype() == torch.float32
    tally(f"explosions of {program}", len(rates) * len(times((1, 8), (1, 8, 60))), lost)
