"""Worker processes that do not run the caller's script again."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["main_hidden"]


@contextmanager
def main_hidden() -> Iterator[None]:
    """While active, processes that are started afresh (spawned) do not know which script started them.

    Else each of them first runs that script under another name, since what it is sent might be defined there; a script
    that starts processes and has no `if __name__ == "__main__":` then dies in them. Jobs must come from modules.
    """
    main = sys.modules["__main__"]
    names: dict[str, object] = {name: main.__dict__[name] for name in ("__file__", "__spec__") if name in main.__dict__}
    main.__dict__.pop("__file__", None)
    main.__spec__ = None
    try:
        yield
    finally:
        main.__dict__.update(names)
