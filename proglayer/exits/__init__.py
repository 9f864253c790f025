"""What the exits of stored models are worth: early exit, acceptance, layers left out or swapped.

`python -m proglayer.exits RUN...` measures it and trains nothing.
"""
