"""The rows of an experiment in a folder: kept after each run, gone on with, read by the notebooks.

A run is known by its study, its name in it and its seed. Worker processes share those that a folder does not have yet,
and after each one its row is in results.json, so that what was stopped goes on where it was. Samples of seed 0 are kept
too, to be looked at.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from minidistill import _validate
from minidistill.studies.cifar10_speed import hardware
from minidistill.studies.spawned import main_hidden
from minidistill.training import checkpoints, parallel

__all__ = ["Stored", "collect", "read"]


@dataclass(frozen=True)
class Stored:
    """What an experiment left in a folder."""

    about: dict[str, Any]  # hardware, torch, workers
    rows: list[dict[str, Any]]
    points: dict[str, Any]

    def runs(self, study: str, name: str, key: str) -> list[Any]:
        """One number of every seed's run, in the order of seeds; none if there are no runs."""
        return [row[key] for row in self.rows if (row["study"], row["name"]) == (study, name)]

    def median(self, study: str, name: str, key: str) -> float:
        return float(np.median(self.runs(study, name, key)))

    def samples(self, study: str, name: str) -> Tensor:
        """Of seed 0, (n, *shape)."""
        return torch.from_numpy(self.points[f"{study}: {name}"].astype(np.float32))


def read(folder: str | Path, program: str) -> Stored:
    """The rows and samples in a folder. FileNotFoundError, which says where to get them, if they are not there."""
    folder = _validate.path("folder", folder)
    if not (folder / "results.json").is_file():
        raise FileNotFoundError(f"{folder / 'results.json'}: no such file; take figures/{program} from the "
                                f"project's repository, beside its folder tutorials, or make it: minidistill {program} "
                                "--out FOLDER")
    return _so_far(folder)


def _so_far(folder: Path) -> Stored:
    """The rows and samples in a folder; none if there are no files yet."""
    file, pictures = folder / "results.json", folder / "samples.npz"
    about = json.loads(file.read_text()) if file.exists() else {"rows": []}
    return Stored(about, about.pop("rows"), dict(np.load(pictures)) if pictures.exists() else {})


def collect(
    out: str | Path, run: Callable[[str, str, int], dict[str, Any]], trials: Mapping[str, Sequence[str]],
    studies: Sequence[str], seeds: Sequence[int], workers: int,
) -> None:
    """Make the rows of these studies and seeds that `out` does not have.

    run: (study, name, seed) to a row, of which "samples" is an array; a function of a module, for it is sent to other
        processes.
    trials: the names in every study, in the order in which rows are kept.
    """
    out = _validate.path("out", out)
    file, pictures, stored = checkpoints.writable(out / "results.json"), out / "samples.npz", _so_far(out)
    rows, points = stored.rows, stored.points
    have = {(row["study"], row["name"], row["seed"]) for row in rows}
    jobs = [job for study in studies for seed in seeds for name in trials[study]
            if (job := (study, name, seed)) not in have]
    order = {key: i for i, key in enumerate((study, name) for study in trials for name in trials[study])}
    about = {"hardware": hardware("cpu"), "torch": torch.__version__, "workers": workers}
    with parallel.workers(workers, torch.set_num_threads, (1,)) as pool:
        with main_hidden():
            futures = [pool.submit(run, *job) for job in jobs]
        for future in tqdm(as_completed(futures), total=len(jobs), desc=out.name, unit="run"):
            row = future.result()
            samples = row.pop("samples")
            if row["seed"] == 0:
                points[f"{row['study']}: {row['name']}"] = samples.astype(np.float16)
                with checkpoints.atomic(pictures) as path, path.open("wb") as stream:
                    np.savez_compressed(stream, **points)
            rows.append(row)
            rows.sort(key=lambda row: (order[row["study"], row["name"]], row["seed"]))
            lines = ",\n".join(json.dumps(row) for row in rows)
            with checkpoints.atomic(file) as path:
                path.write_text(f'{json.dumps(about)[:-1]}, "rows": [\n{lines}\n]}}\n')
