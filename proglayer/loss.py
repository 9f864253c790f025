"""Linear cross-entropy at several exits that never holds all logits.

The output head dominates a training step when the vocabulary is large: its logits do not fit any
cache, nor, on a small machine, the memory. Here they are formed for a chunk of tokens at a time,
and both gradients are formed with them in the forward pass, so that no logit outlives its chunk
(after Wijmans et al. 2024, "Cut your losses in large-vocabulary language models", and Liger-Kernel's
fused linear cross-entropy).

What makes it fast on a CPU, beside the chunks themselves:

- A chunk is (words, rows), not (rows, words): all three products then read and write long rows.
- Within a chunk the words go in blocks that stay in the second-level cache from the product that
  makes the logits to the one that reads their exponentials.
- Exponentials are of base 2 (the hidden state is scaled by log2 e beforehand), which PyTorch
  computes three times as fast as `exp`.
- Nothing is normalised in the large buffer. With E = exp(logit) and Z its sum over words, the
  gradient of a hidden state is (E @ head) / Z - head[target], and the head's is a product of E with
  hidden states that were divided by Z before.
- No maximum is subtracted as long as sums stay far from the limits of float32. Whether they did is
  checked after each chunk; if not, the chunk is done again with the maximum subtracted.

Shapes in names: n tokens, e exits, m rows (the tokens of all exits, stacked), d model dimension,
v vocabulary, b blocks of words. `x_nd` is a tensor of (tokens, dim).
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

LOG2_E = math.log2(math.e)
LN_2 = math.log(2)

# Without a maximum subtracted, a row is exact as long as its target's exponential and the sum of
# all stay within these: quotients of them and products with hidden states are then normal numbers.
SAFE_LOW, SAFE_HIGH = 2.0**-60, 2.0**60


@dataclass(frozen=True)
class ExitLosses:
    """Cross-entropy at every exit, in the order in which the exits were given.

    loss: scalar, differentiable; the sum over exits of weight x mean over tokens (nats), float32
        (float64 for float64 hidden states).
    nll_e: (exits,) sum over tokens of the cross-entropy in nats; float64 (float32 on MPS, which has
        no float64), detached, on the device.
    correct_e: (exits,) int64, tokens whose most likely next word is the target; of equally likely
        words the first counts. All zero when counting was switched off.
    """

    loss: Tensor
    nll_e: Tensor
    correct_e: Tensor


@dataclass(frozen=True)
class ExitScores:
    """`nll_e` and `correct_e` as in ExitLosses, without a loss to differentiate."""

    nll_e: Tensor
    correct_e: Tensor


class Workspace:
    """The large buffer of `linear_cross_entropy`, kept from one call to the next.

    A buffer this large comes from the kernel as untouched pages every time it is allocated; keeping
    it saves those page faults. It holds nothing between calls that a caller may read. Not to be
    shared between threads.
    """

    def __init__(self) -> None:
        self._buffer: Tensor | None = None

    def buffer(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """An uninitialised (rows, columns) tensor with the dtype and device of `like`."""
        kept = self._buffer
        size = rows * columns
        if (
            kept is None
            or kept.numel() < size
            or kept.dtype != like.dtype
            or kept.device != like.device
        ):
            self._buffer = None  # free the old one first
            # Made under inference mode it could not be written to outside of it.
            with torch.inference_mode(False):
                kept = self._buffer = torch.empty(size, dtype=like.dtype, device=like.device)
        return kept[:size].view(rows, columns)


def linear_cross_entropy(
    hidden_end: Sequence[Tensor],
    head_vd: Tensor,
    target_n: Tensor,
    weight_e: Sequence[float],
    *,
    count: bool = True,
    rows: int | None = None,
    block: int | None = None,
    workspace: Workspace | None = None,
) -> ExitLosses:
    """Cross-entropy of `hidden @ head.T` against the targets at each exit, and its weighted sum.

    hidden_end: per exit a (tokens, dim) tensor, float32, bfloat16 or float64, contiguous or not.
        Gradients go to those that require them; the others may come from `torch.no_grad` or
        `torch.inference_mode`.
    head_vd: (vocab, dim), the head's weight; gets a gradient if it requires one.
    target_n: (tokens,) int64. Checked on the CPU only: elsewhere a check would wait for the device.
    weight_e: the weight of each exit in the loss. An exit of weight 0 sends no gradient.
    count: whether to count correct predictions, which costs one more pass over the logits.
    rows, block: tokens per chunk and words per block, by `chunk_rows` and `block_words` if None.
    workspace: buffers to reuse from call to call.

    Products are formed in the dtype of autocast where it is on, otherwise in that of the hidden
    states; exponentials and sums at least in float32. Each gradient has the dtype of its tensor.

    The gradients are made in the forward pass and handed over by the backward pass, so that a
    second backward pass through the same loss raises RuntimeError, also with `retain_graph`.

    Raises ValueError for shapes or dtypes that do not fit, and for targets outside the vocabulary.
    """
    if len(weight_e) != len(hidden_end):
        raise ValueError(f"{len(weight_e)} weights for {len(hidden_end)} exits")
    _check(hidden_end, head_vd, target_n)
    job = _Job(target_n, [float(w) for w in weight_e], count, rows, block, workspace)
    recording = torch.is_grad_enabled()
    job.head_needs = recording and head_vd.requires_grad
    job.hidden_needs = [recording and h.requires_grad for h in hidden_end]
    return ExitLosses(*_LinearCrossEntropy.apply(job, head_vd, *hidden_end))


def evaluate_exits(
    hidden_end: Sequence[Tensor],
    head_vd: Tensor,
    target_n: Tensor,
    *,
    rows: int | None = None,
    block: int | None = None,
) -> ExitScores:
    """Summed cross-entropy and correct predictions at each exit: one product, no gradients.

    Arguments and errors as of `linear_cross_entropy`.
    """
    _check(hidden_end, head_vd, target_n)
    job = _Job(target_n, [0.0] * len(hidden_end), True, rows, block, None)
    with torch.no_grad():
        result = _run(job, head_vd, hidden_end)
    return ExitScores(result.nll_e, result.correct_e)


def chunk_rows(vocab: int, dim: int, dtype: torch.dtype, device_type: str) -> int:
    """Tokens per chunk, for products that read the chunk's exponentials a second time."""
    if device_type != "cpu":
        # As many as fit half a gibibyte: large products, few launches.
        return max(128, min(8192, 2**29 // (vocab * dtype.itemsize) // 128 * 128))
    return 128


def block_words(rows: int, vocab: int, dtype: torch.dtype, device_type: str) -> int:
    """Words per block, so that a block of `rows` tokens stays in the second-level cache."""
    if device_type != "cpu":
        return vocab
    words = cache_bytes() * torch.get_num_threads() // 2 // (rows * dtype.itemsize)
    return min(vocab, max(256, words // 256 * 256))


@functools.cache
def cache_bytes() -> int:
    """Second-level cache of one core, bytes; 1 MiB where the system does not tell."""
    try:
        return os.sysconf("SC_LEVEL2_CACHE_SIZE") or 2**20
    except (ValueError, OSError, AttributeError):
        return 2**20


@dataclass
class _Job:
    """What `_run` is asked for, beside the tensors that autograd must see."""

    target_n: Tensor
    weight_e: list[float]
    count: bool
    rows: int | None
    block: int | None
    workspace: Workspace | None
    head_needs: bool = False
    hidden_needs: Sequence[bool] = ()


@dataclass
class _Result:
    loss: Tensor
    nll_e: Tensor
    correct_e: Tensor
    head_grad: Tensor | None
    hidden_grads: list[Tensor | None]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, job: _Job, head_vd: Tensor, *hidden_end: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        result = _run(job, head_vd, hidden_end)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(result.nll_e, result.correct_e)
        ctx.gradients = (result.head_grad, *result.hidden_grads)  # type: ignore[attr-defined]
        return result.loss, result.nll_e, result.correct_e

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, loss_grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        # Handed over, not kept: a kept reference would make autograd copy the head's gradient.
        gradients = ctx.gradients  # type: ignore[attr-defined]
        ctx.gradients = None  # type: ignore[attr-defined]
        if gradients is None:
            raise RuntimeError("the gradients of this loss were already handed over; form it again")
        if loss_grad is None:
            return (None, *(None for _ in gradients))
        # Elsewhere than on the CPU looking at the value would wait for the device.
        if loss_grad.device.type != "cpu" or loss_grad.item() != 1.0:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(loss_grad)
        return (None, *gradients)


def _check(hidden_end: Sequence[Tensor], head_vd: Tensor, target_n: Tensor) -> None:
    if not hidden_end:
        raise ValueError("no exit to read")
    if target_n.dtype != torch.int64 or target_n.ndim != 1 or not len(target_n):
        raise ValueError(
            f"targets must be a one-dimensional int64 tensor of at least one token, not "
            f"{target_n.dtype} {tuple(target_n.shape)}"
        )
    for hidden_nd in hidden_end:
        if hidden_nd.shape != (len(target_n), head_vd.shape[1]):
            raise ValueError(
                f"a hidden state of shape {tuple(hidden_nd.shape)} for {len(target_n)} targets and "
                f"a head of shape {tuple(head_vd.shape)}"
            )
    for tensor in (head_vd, *hidden_end):
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float64):
            raise ValueError(f"no linear cross-entropy for {tensor.dtype}")
    if target_n.device.type == "cpu":
        low, high = torch.aminmax(target_n)
        if int(low) < 0 or int(high) >= len(head_vd):
            raise ValueError(
                f"targets from {int(low)} to {int(high)} for a vocabulary of {len(head_vd)}"
            )


def _run(job: _Job, head_vd: Tensor, hidden_end: Sequence[Tensor]) -> _Result:
    """The loss at every exit, and the gradients that are asked for."""
    device = head_vd.device
    dtype = functools.reduce(torch.promote_types, [h.dtype for h in hidden_end])
    if torch.is_autocast_enabled(device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device.type)
    with torch.autocast(device.type, enabled=False):
        return _Chunks(job, head_vd, hidden_end, dtype).run()


class _Chunks:
    """One call: rows of all exits stacked, those that need most gradients first, in chunks.

    Stacking reads the head's weights once per chunk, whatever number of exits the chunk spans.
    """

    def __init__(
        self, job: _Job, head_vd: Tensor, hidden_end: Sequence[Tensor], dtype: torch.dtype
    ) -> None:
        self.job, self.head_vd, self.hidden_end = job, head_vd, hidden_end
        self.dtype = dtype
        # Of exponentials, sums and gradients under way.
        self.sum_dtype = torch.promote_types(dtype, torch.float32)
        self.vocab, self.dim = head_vd.shape
        self.device = head_vd.device
        self.on_cpu = self.device.type == "cpu"
        self.tokens = len(job.target_n)

        needs_hidden = [
            bool(needed and weight)
            for needed, weight in zip(
                job.hidden_needs or [False] * len(hidden_end), job.weight_e, strict=True
            )
        ]
        needs_head = [bool(job.head_needs and weight) for weight in job.weight_e]
        self.exits = sorted(
            range(len(hidden_end)), key=lambda e: (not needs_hidden[e], not needs_head[e])
        )
        # How many rows, from the first, send a gradient to the hidden states and to the head.
        self.hidden_rows = sum(needs_hidden) * self.tokens
        self.head_rows = sum(needs_head) * self.tokens
        self.needs_hidden = needs_hidden

        self.head = head_vd.detach().to(dtype)
        self.hidden_md = torch.cat([hidden_end[e].detach().to(dtype) for e in self.exits])
        self.target_m = job.target_n.repeat(len(self.exits))
        self.scale_m = torch.cat(
            [
                torch.full((self.tokens,), job.weight_e[e] / self.tokens, dtype=self.sum_dtype)
                for e in self.exits
            ]
        ).to(self.device)
        total = len(self.hidden_md)
        self.nll_m = torch.empty(total, dtype=self.sum_dtype, device=self.device)
        self.correct_m = torch.zeros(total, dtype=torch.bool, device=self.device)
        self.hidden_grad_md = torch.empty(
            self.hidden_rows, self.dim, dtype=self.sum_dtype, device=self.device
        )
        self.head_grad_vd = (
            torch.empty(self.vocab, self.dim, dtype=self.sum_dtype, device=self.device)
            if self.head_rows
            else None
        )

    def run(self) -> _Result:
        workspace = self.job.workspace or Workspace()
        for first, last, keep in self.spans():
            rows = last - first
            block = self.job.block or block_words(
                rows, self.vocab, self.sum_dtype, self.device.type
            )
            blocks = [(v, min(v + block, self.vocab)) for v in range(0, self.vocab, block)]
            # One row more than words in each block: where targets of other blocks point to.
            height = block + 1
            kept = len(blocks) if keep else 1
            buffer = workspace.buffer(kept * height, rows, self.nll_m)
            views = [
                buffer[(i % kept) * height : (i % kept + 1) * height] for i in range(len(blocks))
            ]
            self.chunk(first, last, keep, blocks, views)
        return self.result()

    def spans(self) -> Iterator[tuple[int, int, bool]]:
        """First and last row of each chunk, and whether its exponentials are read twice."""
        total = len(self.hidden_md)
        rows = self.job.rows or chunk_rows(self.vocab, self.dim, self.sum_dtype, self.device.type)
        for first in range(0, self.head_rows, rows):
            yield first, min(first + rows, self.head_rows), True
        for first in range(self.head_rows, total, rows):
            yield first, min(first + rows, total), False

    def chunk(
        self,
        first: int,
        last: int,
        keep: bool,
        blocks: list[tuple[int, int]],
        views: list[Tensor],
    ) -> None:
        target = self.target_m[first:last]
        scale = self.scale_m[first:last]
        hidden_grad_rows = max(0, min(self.hidden_rows, last) - first)
        hidden = self.hidden_md[first:last]
        hidden_dm = (hidden * LOG2_E if self.dtype == self.sum_dtype else hidden).t().contiguous()

        forward = None
        if self.on_cpu:
            forward = self.fast(hidden_dm, target, hidden_grad_rows, blocks, views)
        if forward is None:
            forward = self.careful(hidden_dm, target, hidden_grad_rows, blocks, views)
        self.nll_m[first:last] = forward.nll
        if forward.correct is not None:
            self.correct_m[first:last] = forward.correct

        if hidden_grad_rows:
            k = hidden_grad_rows
            share = scale / forward.sum
            grad = self.hidden_grad_md[first : first + k]
            torch.mul(forward.weighted_dm.t(), share[:k, None], out=grad)
            grad.addcmul_(
                self.head[target[:k]].to(self.sum_dtype),
                (scale * forward.target_factor)[:k, None],
                value=-1,
            )
        if keep:
            self.add_head_gradient(first, hidden, hidden_dm, target, scale, forward, blocks, views)

    def fast(
        self,
        hidden_dm: Tensor,
        target: Tensor,
        hidden_grad_rows: int,
        blocks: list[tuple[int, int]],
        views: list[Tensor],
    ) -> _Forward | None:
        """A chunk without a maximum subtracted; None if that or a tie asks for care."""
        rows = len(target)
        size = len(views[0]) - 1
        in_block = torch.stack([target - v for v, _ in blocks])
        lasts = torch.tensor([w - v for v, w in blocks]).unsqueeze(1)
        in_block = torch.where((in_block >= 0) & (in_block < lasts), in_block, lasts)
        sums = torch.empty(len(blocks), rows, dtype=self.sum_dtype)
        others = torch.empty_like(sums)
        targets = torch.empty_like(sums)
        weighted = torch.empty(self.dim, hidden_grad_rows, dtype=self.sum_dtype)
        count = self.job.count
        for i, (v, w) in enumerate(blocks):
            logits = views[i][: w - v]
            head = self.head[v:w]
            self.logits(head, hidden_dm, logits)
            index = in_block[i : i + 1]
            torch.gather(views[i], 0, index, out=targets[i : i + 1])
            if count:
                views[i].scatter_(0, index, -math.inf)
                torch.amax(logits, 0, out=others[i])
            logits.exp2_()
            torch.sum(logits, 0, out=sums[i])
            if hidden_grad_rows:
                self.accumulate(weighted, head.t(), logits[:, :hidden_grad_rows], i == 0)
        target_logit = targets.gather(0, (target // size).unsqueeze(0))[0]
        target_power = target_logit.exp2()
        total = sums.sum(0)
        rest = total
        if count:
            total = rest + target_power
        if not bool(((target_power >= SAFE_LOW) & (total <= SAFE_HIGH)).all()):
            return None
        correct = None
        factor = torch.ones_like(total)
        if count:
            other = others.amax(0)
            if bool((target_logit == other).any()):
                return None
            correct = target_logit > other
            factor = rest / total
        return _Forward(
            nll=torch.log2(total / target_power) * LN_2,
            correct=correct,
            sum=total,
            shift=None,
            target_value=-rest if count else target_power - total,
            target_factor=factor,
            weighted_dm=weighted,
        )

    def careful(
        self,
        hidden_dm: Tensor,
        target: Tensor,
        hidden_grad_rows: int,
        blocks: list[tuple[int, int]],
        views: list[Tensor],
    ) -> _Forward:
        """A chunk with the maximum subtracted, block after block (Milakov & Gimelshein 2018)."""
        best = index = total = target_logit = None
        weighted = torch.empty(self.dim, hidden_grad_rows, dtype=self.sum_dtype, device=self.device)
        for i, (v, w) in enumerate(blocks):
            logits = views[i][: w - v]
            head = self.head[v:w]
            self.logits(head, hidden_dm, logits)
            inside = (target >= v) & (target < w)
            value = logits.gather(0, (target - v).clamp(0, w - v - 1).unsqueeze(0))[0]
            block_best, block_index = logits.max(0)
            if best is None:
                target_logit, best, index = value, block_best, block_index
                total = torch.zeros_like(best)
            else:
                target_logit = torch.where(inside, value, target_logit)
                index = torch.where(block_best > best, block_index + v, index)
                # torch.maximum, not where: it keeps NaN.
                higher = torch.maximum(best, block_best)
                shrink = torch.exp2(best - higher)
                total *= shrink
                weighted *= shrink[:hidden_grad_rows]
                best = higher
            logits.sub_(best).exp2_()
            total += logits.sum(0)
            if hidden_grad_rows:
                self.accumulate(weighted, head.t(), logits[:, :hidden_grad_rows], i == 0)
        target_logit = target_logit - best
        return _Forward(
            nll=(total.log2() - target_logit) * LN_2,
            correct=index == target if self.job.count else None,
            sum=total,
            shift=best,
            target_value=target_logit.exp2() - total,
            target_factor=torch.ones_like(total),
            weighted_dm=weighted,
        )

    def add_head_gradient(
        self,
        first: int,
        hidden: Tensor,
        hidden_dm: Tensor,
        target: Tensor,
        scale: Tensor,
        forward: _Forward,
        blocks: list[tuple[int, int]],
        views: list[Tensor],
    ) -> None:
        share = (hidden * (scale / forward.sum)[:, None]).to(self.dtype)
        size = len(views[0]) - 1
        assert self.head_grad_vd is not None
        for i, (v, w) in enumerate(blocks):
            powers = views[i][: w - v]
            if forward.shift is not None and len(blocks) > 1:
                # Earlier blocks were shifted by another maximum: form them again.
                self.logits(self.head[v:w], hidden_dm, powers)
                powers.sub_(forward.shift).exp2_()
            index = target - v
            index = torch.where((index >= 0) & (index < w - v), index, w - v).unsqueeze(0)
            views[i].scatter_(0, index, forward.target_value.unsqueeze(0))
            self.accumulate(self.head_grad_vd[v:w], powers, share, first == 0)

    def logits(self, head: Tensor, hidden_dm: Tensor, out: Tensor) -> None:
        """Logits in base 2, (words, rows), into `out`."""
        if self.dtype == self.sum_dtype:
            torch.mm(head, hidden_dm, out=out)
        else:
            out.copy_(torch.mm(head, hidden_dm)).mul_(LOG2_E)

    def accumulate(self, total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
        """total += left @ right, or = for the first."""
        if self.dtype == self.sum_dtype:
            if first:
                torch.mm(left, right, out=total)
            else:
                total.addmm_(left, right)
        else:
            product = torch.mm(left.to(self.dtype), right.to(self.dtype))
            if first:
                total.copy_(product)
            else:
                total.add_(product)

    def result(self) -> _Result:
        exits = len(self.exits)
        sum_dtype = torch.float32 if self.device.type == "mps" else torch.float64
        order = torch.tensor(self.exits).argsort().to(self.device)
        nll_e = self.nll_m.view(exits, self.tokens).sum(1, dtype=sum_dtype)[order]
        correct_e = self.correct_m.view(exits, self.tokens).sum(1)[order]
        weight = torch.tensor(self.job.weight_e, dtype=sum_dtype).to(self.device)
        loss = (nll_e * weight).sum().div(self.tokens).to(self.sum_dtype)

        hidden_grads: list[Tensor | None] = []
        place = {e: i for i, e in enumerate(self.exits)}
        for e, hidden_nd in enumerate(self.hidden_end):
            if self.needs_hidden[e]:
                start = place[e] * self.tokens
                grad = self.hidden_grad_md[start : start + self.tokens].to(hidden_nd.dtype)
            elif self.job.hidden_needs and self.job.hidden_needs[e]:
                grad = torch.zeros_like(hidden_nd)
            else:
                grad = None
            hidden_grads.append(grad)
        head_grad = None
        if self.head_grad_vd is not None:
            head_grad = self.head_grad_vd.to(self.head_vd.dtype)
        elif self.job.head_needs:
            head_grad = torch.zeros_like(self.head_vd)
        return _Result(loss, nll_e, correct_e, head_grad, hidden_grads)


@dataclass
class _Forward:
    nll: Tensor
    correct: Tensor | None
    sum: Tensor
    shift: Tensor | None
    target_value: Tensor
    target_factor: Tensor
    weighted_dm: Tensor
