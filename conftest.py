"""Settings that tests and notebook kernels share."""

import os

# One thread each: two workers run beside each other, and kernels inherit these.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MINIDISTILL_SCALE", "smoke")
os.environ.setdefault("MPLBACKEND", "Agg")


def pytest_addoption(parser):
    parser.addoption("--long-faults", action="store_true", help="tests/faults in full: 20 kills of every program, ...")


def pytest_collectstart(collector):
    if hasattr(collector, "skip_compare"):  # a notebook: progress bars and pictures are not compared
        collector.skip_compare += ("stderr", "text/html", "image/svg+xml")
