"""python .ci/rehearse.py OUT: `minidistill cifar10` on a CPU as it may go on a GPU that is lent for minutes: each stage
killed twice at random and then left to its end, out of time, and restarted every time. Prints what is on disk then.

A quarter of an hour; needs CIFAR-10 ($MINIDISTILL_CIFAR10). Its output for two versions of torch is stored in
figures/cifar10/rehearsal.txt.
"""

import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from minidistill.training import checkpoints, progress_of

OUT = Path(sys.argv[1]) / "run"
PROGRAM = [
    sys.executable, "-m", "minidistill", "cifar10", "--size", "32", "--preset", "tiny", "--batch-size", "16",
    "--checkpoint-images", "160", "--batches", "1", "--n", "40", "--reference", "500", "--track", "20",
    "--weights", str(OUT / "none"), "--out", str(OUT),
]
STAGES = (("teacher",), ("student", "--objective", "fisher"), ("student", "--objective", "sida"),
          ("all", "--objective", "reverse_kl"))
MINUTES, RESERVE = 1.2, 0.3


def start(stage, *more, minutes=MINUTES, reserve=RESERVE):
    command = [*PROGRAM, "--stage", stage, "--minutes", str(minutes), "--reserve", str(reserve), *more]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def on_disk():
    """Lines of results.json, the images each model has seen, the step of each state: all of it has to be readable."""
    results = OUT / "results.json"
    found = [f"{len(json.loads(results.read_text())) if results.exists() else 0} records"]
    for file in sorted(OUT.glob("*.safetensors")):
        found.append(f"{file.stem} {checkpoints.load_model(file)[1]['images']} images")
    for file in sorted((OUT / "state").glob("[!.]*.safetensors")):
        found.append(f"state of {file.stem} step {progress_of(file)['step']}")
    return ", ".join(found)


def main():
    random.seed(7)
    shutil.rmtree(OUT, ignore_errors=True)
    print(f"python {sys.version.split()[0]}, torch {torch.__version__}", flush=True)
    for stage in STAGES:
        for kill in (True, True, False):
            begun = time.monotonic()
            process, wait = start(*stage), random.uniform(15, 65)
            try:
                process.wait(wait if kill else None)
                how = f"exit {process.returncode} after {time.monotonic() - begun:.0f} s of {60 * MINUTES:.0f}"
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                how = f"killed after {wait:.0f} s"
            print(f"{stage[0]} {stage[-1] if stage[1:] else ''}: {how}; {on_disk()}", flush=True)
    for stage, minutes in ((("evaluate",), 0.5), (("all", "--objective", "sim"), 0.05)):
        begun = time.monotonic()
        code = start(*stage, minutes=minutes, reserve=minutes / 5).wait()
        print(f"{stage[0]}: exit {code} after {time.monotonic() - begun:.0f} s of {60 * minutes:.0f}; {on_disk()}")


if __name__ == "__main__":
    main()
