"""`python -m minidistill` is `minidistill`."""

import sys

from minidistill.cli import main

if __name__ == "__main__":
    sys.exit(main())
