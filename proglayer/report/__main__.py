"""`python -m proglayer.report FOLDER... -o report/`."""

import sys

from proglayer.report.write import main

sys.exit(main())
