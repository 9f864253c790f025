"""Random streams: one generator for each purpose, never a global one."""

from __future__ import annotations

import hashlib

import torch


def stream(seed: int, purpose: str, *position: int) -> torch.Generator:
    """A CPU generator fixed by the run's seed, what it is for, and where in the run it is used.

    Different arguments give independent streams, so drawing more numbers for one purpose never
    moves another.
    """
    name = f"{seed}/{purpose}/" + "/".join(map(str, position))
    digest = hashlib.sha256(name.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
