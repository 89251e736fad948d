"""`python -m ostro`, for launchers (torchrun) that start modules."""

import sys

from ostro.cli import main

if __name__ == "__main__":
    sys.exit(main())
