"""``python -m fentry`` is ``fentry``."""

from __future__ import annotations

import sys

from fentry.cli import main

if __name__ == "__main__":
    sys.exit(main())
