"""``python -m locaudit``."""

import sys

from locaudit.cli import main

if __name__ == "__main__":
    sys.exit(main())
