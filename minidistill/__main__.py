"""`minidistill`, also as `python -m minidistill`. The rest is imported inside of `main`: that takes seconds, in which
Ctrl-C is to end as well as later."""

import sys

__all__ = ["main"]


def main() -> int:
    """Run the command line; its exit code."""
    try:
        from minidistill.cli import main as program

        return program()
    except KeyboardInterrupt:
        print("minidistill: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
