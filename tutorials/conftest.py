"""How pytest runs notebooks: by nbval, wherever this folder was copied to and wherever pytest was started."""

import os
from pathlib import Path

# Kernels inherit these; each computes with one thread, since several may run beside one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MINIDISTILL_SCALE", "smoke")
os.environ.setdefault("MPLBACKEND", "Agg")


def pytest_configure(config):
    option = config.option
    if hasattr(option, "nbval_lax"):
        option.nbval_lax = not option.nbval  # marked cells are compared, the others only run
        option.nbval_current_env = True
        option.nbval_sanitize_with = option.nbval_sanitize_with or str(Path(__file__).parent / "nbval.cfg")
        option.nbval_cell_timeout = max(option.nbval_cell_timeout, 600)  # a busy machine is not an error


def pytest_collectstart(collector):
    if hasattr(collector, "skip_compare"):  # a notebook: progress bars and pictures are not compared
        collector.skip_compare += ("stderr", "text/html", "image/svg+xml")
