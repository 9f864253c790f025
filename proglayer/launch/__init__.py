"""Many runs: what `train.py` does with one job, sweeps and searches, and where their jobs run."""
