"""Every objective on two exact mixtures, five seeds each: `python -m minidistill.sweep --out figures/sweep`.

Two worker processes share the runs, and after each one its row is in results.json, so a sweep that was stopped goes
on where it was. The samples of seed 0 are kept too, to be looked at. Notebooks 09 and 10 draw both.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from minidistill import checkpoints, cli, metrics, recipes
from minidistill.distillation import DMD, OBJECTIVES, distill
from minidistill.distributions import GaussianMixture, grid, ring
from minidistill.networks import MLP, Denoiser, Generator

#: 8 equal Gaussians on a ring, and 25 on a lattice of which the heaviest weigh four times as much as the lightest.
TARGETS: dict[str, GaussianMixture] = {
    "ring": ring(8),
    "lattice": grid(5, weights=[1.0 + 3 * i % 4 for i in range(25)]),
}
N, STEPS = 10_000, 1500
KEPT = 2000  # samples of each objective at seed 0


def student(target: GaussianMixture, seed: int, gain: float = 4.0) -> Generator:
    """A new student for a mixture of many modes: deeper than `distill`'s own, and sharper from the start."""
    torch.manual_seed(seed)
    network = MLP(target.shape, depth=6, activation="relu", gain=gain)
    return Generator(Denoiser(network, target.sigma_data), 0.5 * target.sigma_data)


def run(name: str, objective: str, seed: int, steps: int = STEPS) -> dict[str, Any]:
    """Distil a target by one objective and measure the student. All have the same settings and `steps` but two, which
    take 5/3 of the steps, since they are cheap or slow:

    dmd: with more pairs and a heavier regression than by default.
    sid: alpha = 1.2 needs a student that is near the data already, as one is that starts from a teacher's weights;
        so the first quarter of its run is SIM's.
    """
    target, rule, own = TARGETS[name], OBJECTIVES[objective], dict[str, Any]()
    generator, first = student(target, seed), 0
    start = time.perf_counter()
    if objective in ("dmd", "sid"):
        steps = steps * 5 // 3
    if objective == "dmd":
        rule = DMD(weight=4.0, needs_pairs=8192)
    if objective == "sid":
        first, own = steps // 4, {"learning_rate": 1e-3}
        distill(target, generator, "sim", steps=first, seed=seed, progress=False)
    made = distill(target, generator, rule, steps=steps - first, seed=seed, progress=False, **own)
    seconds = time.perf_counter() - start
    samples = made.sample(N, seed=1000 + seed)
    kl, coverage = metrics.grid_kl(target, samples), metrics.mode_coverage(target, samples)
    return {
        "target": name, "objective": objective, "seed": seed, "steps": steps, "n": N, "seconds": round(seconds, 1),
        "kl": kl.kl, "reverse_kl": kl.reverse_kl, "outside": kl.outside, "modes": coverage.covered,
        "worst": coverage.worst, "high_quality": coverage.high_quality,
        "over_floor": metrics.over_floor(target, samples, seed), "samples": samples[:KEPT].numpy(),
    }


def sweep(
    out: Path, targets: Sequence[str], objectives: Sequence[str], seeds: int, steps: int, workers: int = 2
) -> None:
    """All runs that `out` does not have yet, its rows and samples being kept after each."""
    file, pictures = checkpoints.writable(out / "results.json"), out / "samples.npz"
    rows = json.loads(file.read_text())["rows"] if file.exists() else []
    points = dict(np.load(pictures)) if pictures.exists() else {}
    have = {(row["target"], row["objective"], row["seed"]) for row in rows}
    jobs = [job for target in targets for seed in range(seeds) for objective in objectives
            if (job := (target, objective, seed)) not in have]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = [pool.submit(run, *job, steps) for job in jobs]
        for future in tqdm(as_completed(futures), total=len(jobs), desc="sweep", unit="run"):
            row = future.result()
            samples = row.pop("samples")
            if row["seed"] == 0:
                points[f"{row['target']} {row['objective']}"] = samples.astype(np.float16)
                with checkpoints.atomic(pictures) as path, path.open("wb") as stream:
                    np.savez_compressed(stream, **points)
            rows.append(row)
            about = {"hardware": recipes.hardware("cpu"), "torch": torch.__version__, "workers": workers}
            with checkpoints.atomic(file) as path:
                path.write_text(json.dumps(about | {"rows": sorted(rows, key=_order)}, indent=1) + "\n")


def _order(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["target"], list(OBJECTIVES).index(row["objective"]), row["seed"]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code, as `minidistill.cli.main`."""
    parser = argparse.ArgumentParser(prog="python -m minidistill.sweep", description=(__doc__ or "").split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/sweep"), help="a folder for results.json and samples.npz")
    add("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), metavar="NAME", help=", ".join(TARGETS))
    add("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES), metavar="NAME",
        help="names of distillation.OBJECTIVES")
    add("--seeds", type=int, default=5, help="runs of each, with seeds 0, 1, ...")
    add("--steps", type=int, default=STEPS)
    a = parser.parse_args(argv)
    return cli.run("sweep", lambda: sweep(a.out, a.targets, a.objectives, a.seeds, a.steps))


if __name__ == "__main__":
    sys.exit(main())
