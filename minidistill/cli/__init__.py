"""The command line: every program of the project is a subcommand of `minidistill`.

    program.py    what may be asked, and how an error is told
    commands.py   what each command does with its options
"""

from minidistill.cli.program import main, run

__all__ = ["main", "run"]
