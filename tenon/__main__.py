"""``python -m tenon``, the same as ``tenon``."""

import sys

from tenon.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
