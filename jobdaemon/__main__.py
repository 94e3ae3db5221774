"""``python -m jobdaemon``."""

import sys

from jobdaemon.cli import main

if __name__ == "__main__":
    sys.exit(main())
