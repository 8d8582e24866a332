"""``python -m locaudit``."""

import sys

from locaudit.start import main

sys.exit(main())
