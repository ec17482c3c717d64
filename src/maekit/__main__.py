"""The command, as ``python -m maekit``."""

import sys

from maekit.cli import main

if __name__ == "__main__":
    sys.exit(main())
