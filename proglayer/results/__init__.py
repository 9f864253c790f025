"""The records of any number of runs as tidy pandas frames, and the table of a sweep.

    results = proglayer.results.load("multirun/...")
    results.runs, results.phases, results.epochs, results.exits

`python -m proglayer.results FOLDER...` prints the table and writes the frames.
"""

from proglayer.results.read import Results, load

__all__ = ["Results", "load"]
