"""Data frames to an answer: what the data of a study say, as a page with tables and pictures.

`python -m proglayer.report FOLDER... -o report/` writes it.
"""

from proglayer.report.page import write_report

__all__ = ["write_report"]
