"""The floor of a training step: its matrix products and nothing else.

The head's products come in several blockings, of which the fastest counts, each block's while it is
in cache. The body's are those of its layers, projections side by side and attention per head.

Shapes in names: as in `loss`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from proglayer.training.blocks import cache_bytes
from proglayer.training.plan import Phase


@dataclass(frozen=True)
class Blocking:
    """How the products with the head are cut: `rows` of hidden states by `words` of the head.

    words_first: logits lie as (words, rows), otherwise as (rows, words).
    parts: a block of words in so many products of a batch; 1 leaves it whole.
    """

    rows: int
    words: int
    words_first: bool
    parts: int

    def __str__(self) -> str:
        order = "words x rows" if self.words_first else "rows x words"
        cut = f" in {self.parts} parts" if self.parts > 1 else ""
        return f"{self.words} x {self.rows} {order}{cut}"


@dataclass(frozen=True)
class Need:
    """What `rows` rows need beside their logits: gradients of the hidden states, of the head."""

    rows: int
    to_hidden: bool
    to_head: bool


def step_needs(phase: Phase, seq_len: int) -> list[Need]:
    """What the exits that a step reads need of the head."""
    rows = phase.batch_size * seq_len
    return [
        Need(rows, reaches(phase, exit), phase.rates.head is not None)
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
    the gradient of the logits were the logits. Exits of equal needs are stacked.
    """

    def __init__(self, needs: Sequence[Need], head_vd: Tensor, blocking: Blocking) -> None:
        self.head_vd, self.blocking = head_vd, blocking
        self.head_grad_vd = torch.empty_like(head_vd)
        dim = head_vd.shape[1]
        self.groups: list[Need] = []
        for to_hidden, to_head in sorted({(n.to_hidden, n.to_head) for n in needs}, reverse=True):
            members = [n.rows for n in needs if (n.to_hidden, n.to_head) == (to_hidden, to_head)]
            self.groups.append(Need(sum(members), to_hidden, to_head))
        self.hidden = [torch.randn(n.rows, dim).to(head_vd) for n in self.groups]
        self.hidden_grads = [torch.empty_like(hidden_md) for hidden_md in self.hidden]
        self.buffer = head_vd.new_empty(blocking.rows * blocking.words)

    def __call__(self) -> None:
        begun = False
        for need, hidden_md, grad_md in zip(
            self.groups, self.hidden, self.hidden_grads, strict=True
        ):
            for first in range(0, need.rows, self.blocking.rows):
                rows = slice(first, first + self.blocking.rows)
                self.chunk(need, hidden_md[rows], grad_md[rows], not begun)
                begun = begun or need.to_head

    def chunk(self, need: Need, hidden_md: Tensor, grad_md: Tensor, first: bool) -> None:
        cut = self.blocking
        rows = len(hidden_md)
        hidden_dm = hidden_md.t().contiguous() if cut.words_first else hidden_md.t()
        total_pdm = hidden_md.new_zeros(cut.parts, len(hidden_dm), rows)
        for v in range(0, len(self.head_vd), cut.words):
            head = self.head_vd[v : v + cut.words]
            words = len(head)
            if not cut.words_first:
                logits = self.buffer[: rows * words].view(rows, words)
                torch.mm(hidden_md, head.t(), out=logits)
                if need.to_hidden:
                    torch.mm(logits, head, out=grad_md) if v == 0 else grad_md.addmm_(logits, head)
                if need.to_head:
                    _add_product(self.head_grad_vd[v : v + words], logits.t(), hidden_md, first)
                continue
            parts = cut.parts if words % cut.parts == 0 else 1
            head_pvd = head.unflatten(0, (parts, -1))
            logits = self.buffer[: rows * words].view(parts, words // parts, rows)
            torch.bmm(head_pvd, hidden_dm.expand(parts, *hidden_dm.shape), out=logits)
            if need.to_hidden:
                total_pdm[:parts].baddbmm_(head_pvd.transpose(1, 2), logits)
            if need.to_head:
                grad_pvd = self.head_grad_vd[v : v + words].unflatten(0, (parts, -1))
                _add_product(grad_pvd, logits, hidden_md.expand(parts, *hidden_md.shape), first)
        if need.to_hidden and cut.words_first:
            torch.sum(total_pdm, 0, out=grad_md.t())


def _add_product(total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """total += left @ right; the first time, = instead. Two or three dimensions."""
    if first:
        torch.matmul(left, right, out=total)
    elif total.ndim == 3:
        total.baddbmm_(left, right)
    else:
        total.addmm_(left, right)


def blockings(device: torch.device, vocab: int, itemsize: int) -> list[Blocking]:
    """Blockings worth a look."""
    if device.type != "cpu":
        sizes = [(2048, vocab), (8192, vocab), (8192, 16384), (32768, 8192)]
        return [Blocking(m, min(v, vocab), order, 1) for m, v in sizes for order in (True, False)]
    threads = torch.get_num_threads()
    found = []
    for rows in (256, 512, 1024):
        # Logits that fill the second-level caches in use, or half of them.
        for share in (0.5, 1):
            words = max(16, int(share * cache_bytes() / (rows * itemsize)) // 16 * 16) * threads
            found += [Blocking(rows, words, True, parts) for parts in {1, threads}]
    found += [Blocking(128, vocab, False, 1), Blocking(512, 4096, False, 1)]
    return [replace(blocking, words=min(blocking.words, vocab)) for blocking in found]


class BodyProducts:
    """The products of the layers in a step: projections side by side, attention per head."""

    def __init__(self, phase: Phase, seq_len: int, dtype: torch.dtype, device: torch.device):
        shape = phase.architecture
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
        read = max(exit for exit, weight in enumerate(phase.exit_weights) if weight > 0)
        for layer in range(read + 1):
            for name, (batch, rows, inner, columns) in forward.items():
                shapes.append((batch, rows, inner, columns))
                attention = name in ("scores", "mixture")
                # Within a layer that trains, gradients reach everything but its first matrices.
                passes_on = reaches(phase, layer)
                if name == "query, key, value":
                    passes_on = reaches(phase, layer - 1)
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
            if len(out) == 1:
                torch.mm(left[0], right[0], out=out[0])
            else:
                torch.bmm(left, right, out=out)
