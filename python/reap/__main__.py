"""python -m reap."""

import sys

from reap.cli import main

if __name__ == "__main__":
    sys.exit(main())
