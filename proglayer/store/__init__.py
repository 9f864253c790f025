"""Nothing is trained twice: what phases gave in training, on disk under their keys.

`trajectory` trains or reads a phase's epochs; `entries` holds their files; `checkpoint` turns
weights and states into bytes. `python -m proglayer.store` lists a store and makes room.
"""
