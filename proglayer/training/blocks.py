"""How the fused loss cuts its work: rows of a chunk, vocabulary entries of a block, and its buffer.

Nothing here changes a result beyond the order of its sums.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import os

import torch
from torch import Tensor

# Bounds on a chunk's kept exponentials: a buffer that a laptop can spare, and a GPU.
KEPT_BYTES = 150_000_000
KEPT_BYTES_ON_DEVICE = 1_000_000_000

HUGE_PAGE_BYTES = 2 * 2**20


class Workspace:
    """The large buffer of `linear_cross_entropy`, kept from one call to the next.

    A buffer this large comes from the kernel as untouched pages every time it is allocated; keeping
    it saves those page faults. It holds nothing between calls that a caller may read. Not to be
    shared between threads.

    rows, block: tokens per chunk and vocabulary entries per block, by `chunk_rows` and
        `block_entries` if None. Elsewhere than on the CPU a block is the whole vocabulary.
    held: the buffer of the last call, if there was one.
    """

    def __init__(self, rows: int | None = None, block: int | None = None) -> None:
        self.rows, self.block = rows, block
        self.held: Tensor | None = None

    def buffer(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """An uninitialised (rows, columns) tensor with the dtype and device of `like`."""
        kept, size, kind = self.held, rows * columns, (like.dtype, like.device)
        if kept is None or kept.numel() < size or (kept.dtype, kept.device) != kind:
            self.held = None  # free the old one first
            # Made under inference mode it could not be written to outside of it.
            with torch.inference_mode(False):
                kept = self.held = _large(size, like)
        return kept[:size].view(rows, columns)


def _large(size: int, like: Tensor) -> Tensor:
    """An uninitialised (size,) tensor with the dtype and device of `like`.

    On Linux in huge pages, where it fills several and the system grants them: addresses take fewer
    steps to find, and the processor reads ahead across more than 4 KiB.
    """
    room = size * like.dtype.itemsize
    on_cpu = like.device.type == "cpu" and hasattr(mmap, "MADV_HUGEPAGE")
    if not on_cpu or room < 8 * HUGE_PAGE_BYTES:
        return torch.empty(size, dtype=like.dtype, device=like.device)
    room += HUGE_PAGE_BYTES  # to begin with a whole one
    pages = mmap.mmap(-1, room, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        pages.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(pages, dtype=like.dtype)  # holds the pages
    first = -whole.data_ptr() % HUGE_PAGE_BYTES // like.dtype.itemsize
    return whole[first : first + size]


def chunk_rows(rows: int, vocab: int, keep: bool, dtype: torch.dtype, device_type: str) -> int:
    """Rows per chunk, of `rows` in all; `keep` if the chunk's exponentials are kept for the head.

    The more rows, the less often the head and its gradient are read and written; what is kept is
    held under a bound, at the price of a few percent of time for the largest vocabularies.
    """
    size = dtype.itemsize
    if device_type == "cpu":
        most = min(1024, KEPT_BYTES // (vocab * size)) if keep else 512
    else:
        # Products large enough to fill the device, and few launches.
        most = min(8192, KEPT_BYTES_ON_DEVICE // (vocab * size))
    most = max(128, most // 128 * 128)
    chunks = -(-rows // most)
    # About even, as a short last chunk is slow for its size; 16 keeps rows of the buffer aligned.
    return min(rows, -(-rows // chunks // 16) * 16)


def block_entries(rows: int, vocab: int, dtype: torch.dtype, device_type: str) -> int:
    """Vocabulary entries per block: a block of `rows` rows fills the second-level caches twice.

    Half as many would fit, but take twice the operations, which costs more. A multiple of the
    number of threads: a block is cut into as many parts.
    """
    if device_type != "cpu":
        return vocab
    entries = 2 * cache_bytes() // (rows * dtype.itemsize)
    return min(vocab, max(256, entries // 256 * 256) * torch.get_num_threads())


@functools.cache
def cache_bytes() -> int:
    """Second-level cache of one core, bytes; 1 MiB where the system does not report it."""
    try:
        return os.sysconf("SC_LEVEL2_CACHE_SIZE") or 2**20
    except (ValueError, OSError, AttributeError):
        return 2**20
