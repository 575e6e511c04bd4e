"""`minidistill quickstart`: a ring of Gaussians and the real 8x8 digits, each distilled to one network call.

On a CPU with two cores or more the five runs share two worker processes; elsewhere they follow one another.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot as plt
from torch import Tensor
from tqdm.auto import tqdm

from minidistill import _validate, data, metrics, plotting, samplers, teachers, training
from minidistill._random import seeded
from minidistill.distillation import distill, draw
from minidistill.distributions import GaussianMixture, ring
from minidistill.metrics import classifier
from minidistill.networks import MLP, Generator
from minidistill.studies.spawned import main_hidden
from minidistill.training import checkpoints
from minidistill.training.parallel import workers

__all__ = [
    "DIGITS_N", "DIGITS_STEPS", "DIGITS_TEACHER_STEPS", "NAMES", "RING_N", "RING_OBJECTIVES", "RING_OPTIONS",
    "RING_STEPS", "RING_WEIGHTS", "quickstart", "run_digits", "run_ring", "target",
]

RING_OBJECTIVES = ("drifting", "reverse_kl", "forward_kl", "sim")
#: Of `distill`, where an objective does better with other ones than its defaults.
RING_OPTIONS: dict[str, dict[str, Any]] = {
    "drifting": {"batch_size": 512, "ema_halflife": 50_000},
}
RING_WEIGHTS = (1, 2, 1, 3, 1, 2, 1, 1)
RING_N, RING_STEPS = 20_000, 3000
DIGITS_N, DIGITS_TEACHER_STEPS, DIGITS_STEPS = 4000, 2500, 1800
NAMES = {"drifting": "drifting", "reverse_kl": "reverse KL", "forward_kl": "forward KL", "sim": "SIM pseudo-Huber"}


def target() -> GaussianMixture:
    """The quickstart's teacher: 8 Gaussians on a ring, the heaviest three times as likely as the lightest."""
    return ring(weights=RING_WEIGHTS)


def run_ring(objective: str, steps: int, seed: int, device: str) -> dict[str, Any]:
    """Distill the exact ring by one objective and measure the student; samples come back as "samples"."""
    teacher = target().to(torch.device(device))
    start = time.perf_counter()

    def evaluate(generator: Generator) -> dict[str, float]:
        measured = metrics.kl_both_ways(teacher, draw(generator, RING_N, seed=seed + 1))
        return {"kl": measured.kl, "reverse_kl": measured.reverse_kl, "outside": measured.outside}

    student = distill(teacher, objective=objective, steps=steps, seed=seed, evaluate=evaluate,
                      evaluate_every=max(1, steps // 20), description=NAMES[objective],
                      **RING_OPTIONS.get(objective, {}))
    seconds = time.perf_counter() - start
    samples = student.sample(RING_N, seed=seed + 2)
    coverage = metrics.mode_coverage(teacher, samples)
    final = metrics.kl_both_ways(teacher, samples)
    return {
        "objective": objective, "seconds": seconds, "steps": steps, "seed": seed, "n": RING_N,
        "kl": final.kl, "reverse_kl": final.reverse_kl, "smoothing_sigma": final.sigma, "outside_grid": final.outside,
        "modes": coverage.covered, "worst_mode_error": coverage.worst, "high_quality": coverage.high_quality,
        "sliced_w2_over_floor": metrics.over_floor(teacher, samples, seed + 3, sets=4),
        "curve": [[r["step"], r["kl"]] for r in student.history if "kl" in r], "samples": samples.cpu(),
    }


def run_digits(teacher_steps: int, steps: int, seed: int, device: str) -> dict[str, Any]:
    """Train a class-conditional teacher on the digits, distill it with SIM, and measure both in the same way."""
    images, labels = data.digits()
    judge = classifier.train_classifier(images, labels, seed=seed)
    reference = judge.features(images)
    start = time.perf_counter()
    with seeded(seed):
        network = MLP(tuple(images.shape[1:]), hidden=256, depth=4, n_classes=10)
    teacher = teachers.train_denoiser(images, network, labels=labels, steps=teacher_steps, seed=seed, device=device)
    teacher_seconds, start = time.perf_counter() - start, time.perf_counter()
    student = distill(teacher, objective="sim", steps=steps, seed=seed, critic_steps=2, learning_rate=3e-4,
                      critic_learning_rate=1e-3, sigma_max=3.5 * teacher.sigma_data, ema_halflife=50_000,
                      description="digits: SIM")
    student_seconds = time.perf_counter() - start

    asked = torch.arange(DIGITS_N) % 10
    sigmas = samplers.levels_of(teacher, 18)
    noise = torch.randn(DIGITS_N, *teacher.shape, generator=training.generator_on("cpu", seed + 1))
    many_calls = samplers.heun(teacher, (sigmas[0] * noise).to(device), sigmas, label=asked.to(device)).cpu()
    one_call = student.sample(DIGITS_N, label=asked, seed=seed + 1).cpu()

    def measure(x: Tensor) -> dict[str, float]:
        distance = metrics.frechet_distance(judge.features(x), reference)
        return {"frechet": distance, "recognised": judge.recognised(x, asked)}

    at_35, at_1 = measure(many_calls), measure(one_call)
    first = torch.cat([(labels == digit).nonzero()[:10] for digit in range(10)]).flatten()
    return {
        "objective": "sim", "n": DIGITS_N, "n_real": len(images), "seed": seed, "steps": steps,
        "teacher_steps": teacher_steps,
        "features": f"{reference.shape[1]} hidden units of a classifier trained on the digits",
        "teacher": {**at_35, "calls": 35, "seconds": teacher_seconds},
        "student": {**at_1, "calls": 1, "seconds": student_seconds},
        "frechet_ratio": at_1["frechet"] / at_35["frechet"],
        "pictures": [images[first], many_calls[asked.argsort(stable=True)][_ten_each()],
                     one_call[asked.argsort(stable=True)][_ten_each()]],
    }


def _ten_each() -> Tensor:
    """Positions of the first ten of each class among DIGITS_N samples sorted by class."""
    return (torch.arange(10).unsqueeze(1) * (DIGITS_N // 10) + torch.arange(10)).flatten()


def quickstart(
    out: str | Path = "runs/quickstart", *, only: str | None = None, steps: int | None = None, seed: int = 0,
    device: str = "cpu",
) -> dict[str, Any]:
    """Run it all, write figures and `results.json` under `out`, print one table and return the results.

    only: "ring" or "digits" for one half. steps: fewer (or more) distillation steps for every run; the digits'
    teacher then trains for at most as many. Raises ValueError for other values, OSError if `out` can't be written.
    """
    if only is not None:
        _validate.choose("only", only, {half: half for half in ("ring", "digits")})
    if steps is not None:
        _validate.whole("steps", steps)
    out = _validate.path("out", out)
    checkpoints.writable(out / "results.json")
    began = time.perf_counter()
    jobs: list[tuple[Any, ...]] = []
    if only != "ring":
        teacher_steps = DIGITS_TEACHER_STEPS if steps is None else min(steps, DIGITS_TEACHER_STEPS)
        jobs.append((run_digits, teacher_steps, DIGITS_STEPS if steps is None else steps, seed, device))
    if only != "digits":
        # Those that learn a ratio take longest, so they go first.
        order = sorted(RING_OBJECTIVES, key=lambda name: name in ("reverse_kl", "sim"))
        jobs += [(run_ring, name, RING_STEPS if steps is None else steps, seed, device) for name in order]
    done = _run(jobs, parallel=device == "cpu" and len(jobs) > 1 and (os.cpu_count() or 1) > 1)
    rings = {r["objective"]: r for r in done if "kl" in r}
    rings = {name: rings[name] for name in RING_OBJECTIVES if name in rings}
    digits = next((r for r in done if "pictures" in r), None)
    plotting.use_theme()
    if rings:
        _ring_figure(rings, out)
        _kl_figure(rings, out)
    if digits:
        _digits_figure(digits, out)
    results = {
        "command": "minidistill quickstart", "seconds": time.perf_counter() - began, "torch": torch.__version__,
        "hardware": _hardware(device), "ring": [_plain(r) for r in rings.values()],
        "digits": None if digits is None else _plain(digits),
    }
    with checkpoints.atomic(out / "results.json") as name:
        name.write_text(json.dumps(results, indent=1) + "\n")
    print(_table(results))
    print(f"figures and results.json in {out}, after {results['seconds']:.0f} s")
    return results


def _run(jobs: list[tuple[Any, ...]], parallel: bool) -> list[dict[str, Any]]:
    if not parallel:
        return [job(*arguments) for job, *arguments in jobs]
    context = multiprocessing.get_context("spawn")
    lines = context.Value("i", 0)
    with workers(2, _worker, (lines, context.RLock())) as pool:
        with main_hidden():
            futures = [pool.submit(*job) for job in jobs]
        return [future.result() for future in futures]


def _worker(lines: Any, lock: Any) -> None:
    """One thread and one line of the terminal for each worker."""
    torch.set_num_threads(1)
    tqdm.set_lock(lock)
    with lines.get_lock():
        training.bar_options.update(position=lines.value, leave=False)
        lines.value += 1


def _hardware(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} x {platform.machine()} CPU cores"


def _plain(result: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result.items() if key not in ("samples", "pictures")}


def _ring_figure(rings: dict[str, dict[str, Any]], out: Path) -> None:
    teacher = target()
    size = (3.1 * (1 + len(rings)), 3.6)
    figure, axes = plt.subplots(1, 1 + len(rings), figsize=size, layout="constrained", sharey=True)
    exact = teacher.sample(3000, training.generator_on("cpu", 0))
    plotting.scatter(exact, axes[0], target=teacher, title="teacher, exact samples\n", color=plotting.PALETTE[1])
    for ax, result in zip(axes[1:], rings.values(), strict=True):
        title = f"{NAMES[result['objective']]}, one call\nKL = {result['kl']:.3f}"
        plotting.scatter(result["samples"], ax, target=teacher, title=title)
    for ax in axes[1:]:
        ax.set_ylabel("")
    plotting.save(figure, out / "ring.png")


def _kl_figure(rings: dict[str, dict[str, Any]], out: Path) -> None:
    figure, ax = plt.subplots(figsize=(6.5, 4.4), layout="constrained")
    curves = {NAMES[name]: ([k for k, _ in r["curve"]], [kl for _, kl in r["curve"]]) for name, r in rings.items()}
    plotting.curves(curves, ax, xlabel="generator step", ylabel=r"KL(teacher $\|$ student), nats")
    ax.set_title(r"Ring of 8 Gaussians, both smoothed at $\sigma$ = 0.1")
    plotting.save(figure, out / "ring_kl.png")


def _digits_figure(digits: dict[str, Any], out: Path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.5), layout="constrained")
    titles = ["real digits\n"] + [
        f"{who}, {digits[who]['calls']} network call{'s' if digits[who]['calls'] > 1 else ''}\n"
        f"Fréchet distance {digits[who]['frechet']:.2f}, {digits[who]['recognised']:.1%} recognised"
        for who in ("teacher", "student")
    ]
    for ax, pictures, title in zip(axes, digits["pictures"], titles, strict=True):
        plotting.image_grid(pictures, ax, title=title)
    plotting.save(figure, out / "digits.png")


def _table(results: dict[str, Any]) -> str:
    def row(*cells: str) -> str:
        return f"{cells[0]:<18}" + "".join(f"{cell:>12}" for cell in cells[1:])

    lines = []
    if results["ring"]:
        lines.append(row("ring, one call", "KL(p||q)", "KL(q||p)", "modes", "worst mode", "SW2/floor", "seconds"))
        lines += [
            row(NAMES[r["objective"]], f"{r['kl']:.3f}", f"{r['reverse_kl']:.3f}", f"{r['modes']}/8",
                f"{r['worst_mode_error']:.0%}", f"{r['sliced_w2_over_floor']:.2f}", f"{r['seconds']:.0f}")
            for r in results["ring"]
        ]
    if results["digits"]:
        lines += ["", row("digits", "calls", "Frechet", "to teacher", "recognised", "", "seconds")]
        for who in ("teacher", "student"):
            d = results["digits"][who]
            ratio = d["frechet"] / results["digits"]["teacher"]["frechet"]
            cells = (f"{d['frechet']:.3f}", f"{ratio:.2f} x", f"{d['recognised']:.1%}", "", f"{d['seconds']:.0f}")
            lines.append(row(who, str(d["calls"]), *cells))
    return "\n".join(lines)
