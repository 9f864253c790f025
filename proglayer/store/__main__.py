"""`python -m proglayer.store list | verify | prune`."""

import sys

from proglayer.store.stages import main

sys.exit(main())
