"""Settings that all tests share; those of the notebooks are in tutorials/conftest.py."""

import os

# One thread each: two workers run beside each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MINIDISTILL_SCALE", "smoke")
os.environ.setdefault("MPLBACKEND", "Agg")


def pytest_addoption(parser):
    parser.addoption("--long-faults", action="store_true", help="tests/faults in full: 20 kills of every program, ...")
