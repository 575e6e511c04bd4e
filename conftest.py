"""Settings that all tests share; those of the notebooks are in tutorials/conftest.py."""

import os
import signal

# One thread each: two workers run beside each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MINIDISTILL_SCALE", "smoke")
os.environ.setdefault("MPLBACKEND", "Agg")

# A shell that runs this in the background, or `nohup`, has these ignored, and every test's child would inherit that.
for name, usual in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
    if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) is signal.SIG_IGN:
        signal.signal(getattr(signal, name), usual)


def pytest_addoption(parser):
    parser.addoption("--long-faults", action="store_true", help="tests/faults in full: 20 kills of every program, ...")
