"""Nothing is trained twice: trained phases on disk under their keys, and the records of runs.

`stages` is the store, `trajectory` trains or reads a phase's epochs through it, `record` is what a
run leaves in its folder. `python -m proglayer.store` lists, verifies and prunes a store.
"""
