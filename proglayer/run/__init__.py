"""One run, from its settings to its record. `experiment` walks the plan: read it first.

Beside it: the machine a run is on, its share of a GPU, its progress, and loggers that get its
metrics.
"""
