"""Benchmarks against peers: the same work done here and by a well-known library, timed alternately in one run.

    python -c "from minidistill import bench; bench.show(bench.run('unet'))"
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from minidistill import _validate
from minidistill.bench import transport, unet
from minidistill.bench.timing import Row

__all__ = ["BENCHES", "run", "show", "table"]

#: Each takes `short` (True for a few repetitions of a smaller case) and perhaps more, and returns rows.
BENCHES: dict[str, Callable[..., list[Row]]] = {"transport": transport.bench, "unet": unet.bench}


def run(name: str, short: bool = False, **options: Any) -> list[Row]:
    """The rows of one benchmark: name, ours, peer, peer_version, ratio (ours / peer; below 1 is faster than the peer),
    unit. `options` go on to the benchmark, such as device. ImportError if the peer is not installed."""
    return _validate.choose("name", name, BENCHES)(short, **options)


def table(rows: Sequence[Row]) -> str:
    """The rows as text, one a line under a header."""
    width = max([len("benchmark"), *(len(row["name"]) for row in rows)])
    lines = [f"{'benchmark':<{width}} {'ours':>10} {'peer':>10} {'ratio':>7}  unit    peer"]
    for row in rows:
        lines.append(f"{row['name']:<{width}} {row['ours']:>10.4g} {row['peer']:>10.4g} {row['ratio']:>7.3f}  "
                     f"{row['unit']:<7} {row['peer_version']}")
    return "\n".join(lines)


def show(rows: Sequence[Row]) -> None:
    """Print the table."""
    print(table(rows))
