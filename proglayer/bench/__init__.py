"""How fast a training step is, and how near to what the machine can do.

`python -m proglayer.bench` measures it.
"""
