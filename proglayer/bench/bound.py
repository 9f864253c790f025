"""The matmul bound of a training step: its matrix products and nothing else.

The head's products are tried in several blockings, each block's while it is in cache; the fastest
counts. The body's are those of its layers, projections side by side and attention per head.

Shapes in names: as in `loss`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from proglayer.training.architecture import Architecture
from proglayer.training.blocks import cache_bytes
from proglayer.training.plan import Phase


@dataclass(frozen=True)
class Blocking:
    """How the products with the head are cut: `rows` hidden states by `entries` of the vocabulary.

    A block comes in `parts` products of one batch, so that each thread has its own.
    """

    rows: int
    entries: int
    parts: int

    def __str__(self) -> str:
        parts = f" in {self.parts} parts" if self.parts > 1 else ""
        return f"{self.entries} x {self.rows}{parts}"


@dataclass(frozen=True)
class Products:
    """What `rows` rows need beside their logits: gradients of the hidden states, of the head."""

    rows: int
    to_hidden: bool
    to_head: bool


def step_products(phase: Phase, seq_len: int) -> list[Products]:
    """What each exit that a training step reads needs of the head."""
    rows = phase.batch_size * seq_len
    return [
        Products(rows, reaches(phase, exit), phase.rates.head is not None)
        for exit, weight in enumerate(phase.exit_weights)
        if weight > 0
    ]


def reaches(phase: Phase, layer: int) -> bool:
    """Whether a gradient of the output of `layer` reaches something that trains."""
    trained = phase.trained_layers
    return phase.rates.embedding is not None or any(below <= layer for below in trained)


class HeadProducts:
    """The products with the head and nothing else, each block's while it is in cache.

    Logits are formed and overwritten; `hidden_grads` and `head_grad_vd` are what they would be if
    the gradient of the logits were the logits.
    """

    def __init__(self, needs: Sequence[Products], head_vd: Tensor, blocking: Blocking) -> None:
        self.head_vd, self.blocking = head_vd, blocking
        self.head_grad_vd = torch.empty_like(head_vd)
        self.needs = needs
        self.hidden = [torch.randn(n.rows, head_vd.shape[1]).to(head_vd) for n in needs]
        self.hidden_grads = [torch.empty_like(hidden_md) for hidden_md in self.hidden]
        self.buffer = head_vd.new_empty(blocking.rows * blocking.entries)

    def __call__(self) -> None:
        first = True
        exits = zip(self.needs, self.hidden, self.hidden_grads, strict=True)
        for need, hidden_md, grad_md in exits:
            for m in range(0, need.rows, self.blocking.rows):
                rows = slice(m, m + self.blocking.rows)
                self.chunk(need, hidden_md[rows], grad_md[rows], first)
                first = first and not need.to_head

    def chunk(self, need: Products, hidden_md: Tensor, grad_md: Tensor, first: bool) -> None:
        rows, dim = hidden_md.shape
        hidden_dm = hidden_md.t().contiguous()
        total_pdm = hidden_md.new_zeros(self.blocking.parts, dim, rows)
        for v in range(0, len(self.head_vd), self.blocking.entries):
            head_vd = self.head_vd[v : v + self.blocking.entries]
            parts = self.blocking.parts if len(head_vd) % self.blocking.parts == 0 else 1
            head_pvd = head_vd.unflatten(0, (parts, -1))
            logits_pvm = self.buffer[: rows * len(head_vd)].view(parts, -1, rows)
            torch.bmm(head_pvd, hidden_dm.expand(parts, dim, rows), out=logits_pvm)
            if need.to_hidden:
                total_pdm[:parts].baddbmm_(head_pvd.transpose(1, 2), logits_pvm)
            if need.to_head:
                grad_pvd = self.head_grad_vd[v : v + len(head_vd)].view(parts, -1, dim)
                hidden_pmd = hidden_md.expand(parts, rows, dim)
                if first:
                    torch.bmm(logits_pvm, hidden_pmd, out=grad_pvd)
                else:
                    grad_pvd.baddbmm_(logits_pvm, hidden_pmd)
        if need.to_hidden:
            torch.sum(total_pdm, 0, out=grad_md.t())


def blockings(device: torch.device, vocab: int, itemsize: int) -> list[Blocking]:
    """Blockings worth a look."""
    if device.type != "cpu":
        sizes = [(2048, vocab), (8192, vocab), (8192, 16384), (32768, 8192)]
        return [Blocking(rows, min(entries, vocab), 1) for rows, entries in sizes]
    threads = torch.get_num_threads()
    found = []
    for rows in (256, 512, 1024):
        # Logits that fill the second-level caches in use, or half of them.
        for share in (0.5, 1):
            entries = max(16, int(share * cache_bytes() / (rows * itemsize)) // 16 * 16) * threads
            found += [Blocking(rows, min(entries, vocab), parts) for parts in {1, threads}]
    return found


class BodyProducts:
    """The products of the layers in a step: projections side by side, attention per head."""

    def __init__(self, phase: Phase, seq_len: int, dtype: torch.dtype, device: torch.device):
        shape = phase.architecture
        assert isinstance(shape, Architecture)
        windows, heads = phase.batch_size, shape.num_heads
        tokens, dim, hidden = windows * seq_len, shape.dim, shape.ffn_multiple * shape.dim
        per_head = dim // heads
        # (batch, rows, inner, columns) of a product, and whether it has a matrix that trains.
        forward = {
            "query, key, value": (1, tokens, dim, 3 * dim),
            "scores": (windows * heads, seq_len, per_head, seq_len),
            "mixture": (windows * heads, seq_len, seq_len, per_head),
            "output": (1, tokens, dim, dim),
            "w1, w3": (1, tokens, dim, 2 * hidden),
            "w2": (1, tokens, hidden, dim),
        }
        shapes = []
        for layer in range(phase.last_read + 1):
            for name, (batch, rows, inner, columns) in forward.items():
                shapes.append((batch, rows, inner, columns))
                attention = name in ("scores", "mixture")
                # Within a layer that trains, gradients reach everything but its first matrices.
                passes_on = reaches(phase, layer - 1 if name == "query, key, value" else layer)
                if passes_on:
                    shapes.append((batch, rows, columns, inner))
                if passes_on if attention else layer in phase.trained_layers:
                    shapes.append((batch, inner, rows, columns))
        kinds = {
            kind: tuple(
                torch.randn(kind[0], a, b, dtype=dtype, device=device)
                for a, b in ((kind[1], kind[2]), (kind[2], kind[3]), (kind[1], kind[3]))
            )
            for kind in set(shapes)
        }
        self.products = [kinds[kind] for kind in shapes]

    def __call__(self) -> None:
        for left, right, out in self.products:
            torch.bmm(left, right, out=out)
