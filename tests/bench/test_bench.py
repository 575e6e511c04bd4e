"""Benchmarks: the rows' form, the peer's likeness, and what happens without the peer. Speed itself is not asserted."""

import math
import sys
from pathlib import Path

import pytest
import torch

from minidistill import bench
from minidistill.bench import timing
from minidistill.bench.transport import peak_memory
from minidistill.bench.unet import Peer, training_step
from minidistill.networks.unet import preset


def test_rows_of_the_unet():
    pytest.importorskip("diffusers")
    rows = bench.run("unet", short=True, progress=False)
    assert len(rows) == 1
    row = rows[0]
    assert row.keys() == timing.Row.__annotations__.keys()
    assert all(math.isfinite(row[key]) and row[key] > 0 for key in ("ours", "peer", "ratio"))
    assert row["ratio"] == pytest.approx(row["ours"] / row["peer"])
    assert row["unit"] == "s/step"
    assert row["peer_version"].startswith("diffusers ")
    assert "1,744,035 / 1,744,035 parameters" in row["name"]


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_the_peer_is_alike(size):
    pytest.importorskip("diffusers")
    with torch.device("meta"):
        network = preset(size)
        peer = Peer(network)
    ours, theirs = (sum(p.numel() for p in each.parameters()) for each in (network, peer))
    assert abs(ours / theirs - 1) < 0.01


def test_both_learn_the_same_images():
    pytest.importorskip("diffusers")
    torch.manual_seed(0)
    network = preset("tiny", shape=(1, 8, 8), channels=16, blocks=1, attention=())
    for each in (network, Peer(network)):
        step = training_step(each, 4, torch.float32, "cpu")
        losses = [step() for _ in range(8)]
        assert losses[-1] < losses[0]


def test_rows_of_transport():
    pytest.importorskip("ot")
    rows = bench.run("transport", short=True, n=100, d=8, progress=False)
    assert len(rows) == 3
    for row in rows:
        assert row.keys() == timing.Row.__annotations__.keys()
        assert all(math.isfinite(row[key]) and row[key] > 0 for key in ("ours", "peer", "ratio"))
        assert row["peer_version"].startswith("POT ")
        assert "n = 100, d = 8" in row["name"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's accounts of memory")
def test_peak_memory_counts_a_large_problem():
    """4,000 samples keep their matrix of 61 MiB in float32, and little else."""
    pytest.importorskip("ot")
    assert 55 < peak_memory(4000, 2, iterations=1) < 4 * 61


def test_alternate_takes_turns_and_leaves_the_warmup_out():
    calls = []
    ours, peer = timing.alternate(lambda: calls.append("o"), lambda: calls.append("p"), 3, 2, progress=False)
    assert "".join(calls) == "op" * 5
    assert 0 < ours < 1
    assert 0 < peer < 1


def test_table(capsys):
    rows = [timing.Row(name=name, ours=1.0, peer=2.0, peer_version="peer 1", ratio=0.5, unit="s/step")
            for name in ("a", "longer")]
    bench.show(rows)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[1].index("1") == lines[2].index("1")
    assert "0.500" in lines[2]


def test_unknown_names_and_a_missing_peer(monkeypatch):
    with pytest.raises(ValueError, match="name='nets' is not known; did you mean"):
        bench.run("nets")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"pip install 'minidistill\[diffusers\]'"):
        bench.run("unet", short=True)
    monkeypatch.setitem(sys.modules, "ot", None)
    with pytest.raises(ImportError, match="pip install POT"):
        bench.run("transport", short=True)
