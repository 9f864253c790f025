"""The records of any number of runs as tidy pandas frames, and the table of a sweep.

    results = proglayer.results.load("multirun/...")
    results.runs, results.phases, results.epochs, results.exits

`python -m proglayer.results FOLDER...` prints the table and writes the frames.
"""

from proglayer.results.columns import plain_values
from proglayer.results.read import Results, load, write_csv
from proglayer.results.variants import GROUPS, NOT_THE_EXPERIMENT, PLACE_OF_TEXT, keys_and_values

__all__ = [
    "GROUPS",
    "NOT_THE_EXPERIMENT",
    "PLACE_OF_TEXT",
    "Results",
    "keys_and_values",
    "load",
    "plain_values",
    "write_csv",
]
