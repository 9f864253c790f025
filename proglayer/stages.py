"""`python -m proglayer.stages`: an older name of `python -m proglayer.store`."""

import sys

from proglayer.store.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
