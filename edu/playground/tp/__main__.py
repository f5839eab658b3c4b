"""`python -m tp` does what the `tp` command does."""

import sys

from tp.cli import main

if __name__ == "__main__":
    sys.exit(main())
