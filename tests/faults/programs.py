"""Programs in processes of their own, which tests kill. They are forked from a server that has imported everything, so
that each begins within milliseconds."""

import multiprocessing
import os
import signal
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch._dynamo  # the first optimizer's step imports it, which takes seconds
from torch import distributed, nn

from minidistill import training
from minidistill.cli import main, program
from minidistill.training import checkpoints, files, parallel

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])

PATIENCE = 90  # seconds until something that should have happened at once is taken for lost


def start(log, function, *arguments):
    """The process of `function(*arguments)`, whose output goes to the file `log`."""
    child = CONTEXT.Process(target=_run, args=(str(log), function, arguments))
    child.start()
    return child


def _run(log, function, arguments):
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for output in (1, 2):
        os.dup2(descriptor, output)
    sys.stdout, sys.stderr = (open(output, "w", closefd=False) for output in (1, 2))  # noqa: SIM115
    sys.exit(function(*arguments))


def minidistill(log, *arguments):
    """A command of the command line, started."""
    return start(log, main, [str(argument) for argument in arguments])


def ended(child, log):
    """The exit code of a process that should end by itself; it is killed if it does not."""
    child.join(PATIENCE)
    if child.exitcode is None:
        child.kill()
        child.join()
        raise AssertionError(f"still running after {PATIENCE} s: {Path(log).read_text()[-2000:]}")
    return child.exitcode


def until(condition, child=None):
    """Wait until it holds, or the process has ended; whether it does."""
    for _ in range(100 * PATIENCE):
        if condition():
            return True
        if child is not None and child.exitcode is not None:
            break
        time.sleep(0.01)
    return bool(condition())


def alive(pid):
    """Whether a process runs; one that has ended, and that nobody has asked after, does not."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


# ------------------------------------------------------------------------------ what runs in a process

def write_often(path, seconds, value):
    """Save one model again and again, beside others who do."""
    tensors = {"x": torch.full((1000,), float(value))}
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        checkpoints.write(path, tensors, {"kind": "samples"})


def read_often(path, seconds, out):
    """Read it; how often is in the file `out`. An error is this process's end."""
    end, count = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        x = checkpoints.read(path, "samples")[0]["x"]
        assert bool((x == x[0]).all())
        count += 1
    Path(out).write_text(str(count))


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def rank_of(rank, port, timeout, function, *arguments):
    """`function(*arguments)` as one of two processes, as torchrun would start it."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port), "MINIDISTILL_TIMEOUT": str(timeout)}
    return function(*arguments)


def two_ranks(folder, timeout, function, *arguments):
    port = free_port()
    return [start(folder / f"log{rank}", rank_of, rank, port, timeout, function, *arguments) for rank in range(2)]


def slow_callback(file, seconds, timeout):
    """A run of two processes, of which the first evaluates for longer than the others wait in an exchange."""
    begin = distributed.init_process_group
    distributed.init_process_group = lambda backend, **given: begin(
        backend, **{**given, "timeout": timedelta(seconds=timeout)})
    parallel.start()

    def update(state):
        return {"loss": parallel.total(torch.ones(()))}

    def callback(state):
        if parallel.rank() == 0:
            time.sleep(seconds)

    state = training.State({"net": nn.Linear(1, 1)}, {}, torch.Generator())
    training.fit(state, update, 12, progress=False, checkpoint=file, callbacks=[callback], callback_every=6)
    parallel.stop()
    return 0


def stopped_on_its_way():
    """Of two processes the second is stopped before they meet; the first's exit code."""
    def go():
        parallel.start()
        if parallel.rank() == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        parallel.meet()

    return program.run("minidistill", go)


def launcher(folder, timeout, arguments):
    """Two processes forked from this one, which waits for them as torchrun does."""
    port, pids = free_port(), []
    for rank in range(2):
        pid = os.fork()
        if pid == 0:
            code = rank_of(rank, port, timeout, main, arguments)
            (folder / f"ended{rank}").write_text(str(code))
            os._exit(code)
        pids.append(pid)
    for pid in pids:
        os.waitpid(pid, 0)
    return 0


def with_workers(out):
    """Two workers at jobs of a minute; their process ids are in the file `out` once they have begun."""
    with parallel.workers(2) as pool:
        jobs = [pool.submit(os.getpid) for _ in range(2)]  # both processes are there when one has answered
        [job.result() for job in jobs]
        jobs = [pool.submit(time.sleep, 60) for _ in range(2)]
        pids = [child.pid for child in multiprocessing.active_children()]
        Path(f"{out}.part").write_text(" ".join(map(str, pids)))
        os.replace(f"{out}.part", out)
        [job.result() for job in jobs]
    return 0


def hold_forever(folder):
    with files.hold(folder):
        if os.fork() == 0:
            time.sleep(20)  # a fork that outlives the run has no part in its lock
            os._exit(0)
        (Path(folder) / "held").touch()
        time.sleep(60)
    return 0
