"""`python -m proglayer.results FOLDER...`."""

import sys

from proglayer.results.summary import main

sys.exit(main())
