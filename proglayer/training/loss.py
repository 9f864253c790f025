"""Linear cross-entropy at several exits that never holds all logits.

The output head dominates a training step when the vocabulary is large: its logits do not fit any
cache, nor, on a small machine, the memory. Here they are formed for a chunk of tokens at a time,
and both gradients are formed with them in the forward pass, so that no logit outlives its chunk
(after Wijmans et al. 2024, "Cut your losses in large-vocabulary language models", and the fused
linear cross-entropy of Liger-Kernel).

What makes it fast on a CPU, beside the chunks themselves:

- A chunk is (vocabulary entries, rows), not (rows, entries): all three products then read and
  write long rows.
- Within a chunk the vocabulary goes in blocks that stay in the nearer caches from the product that
  makes the logits to the one that reads their exponentials. A block is cut into as many parts as
  there are threads and its products are batched over them, so that each core goes on with the
  entries that it has in its cache.
- The head's gradient needs the sums over the whole vocabulary, so it waits until a chunk is
  through. It is formed block by block just before the next chunk's logits take the place of the
  exponentials: one journey of a block between memory and cache instead of two.
- Exponentials are of base 2 (the hidden state is scaled by log2 e beforehand), which PyTorch
  computes three times as fast as `exp`.
- Nothing is normalised in the large buffer. With E = exp(logit) and Z its sum over the vocabulary,
  the gradient of a hidden state is (E @ head) / Z - head[target], and the head's is a product of E
  with hidden states that were divided by Z before.
- No maximum is subtracted as long as sums stay far from the limits of float32. Whether they did is
  checked after each chunk. If not, as in most released models, the target's logit is subtracted,
  which is known beforehand; and where that is too far below the others, the maximum, for which the
  logits are formed once more. Elsewhere than on the CPU a chunk is one block and a look at a value
  would wait for the device: the maximum is subtracted at once.

Shapes in names: n tokens, e exits, m rows (the tokens of all exits, stacked), d model dimension,
v vocabulary, b blocks of the vocabulary, p parts of a block, one a thread. `x_nd` is a tensor of
(tokens, dim).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from proglayer.training.blocks import Workspace, block_entries, chunk_rows

LOG2_E = math.log2(math.e)
LN_2 = math.log(2)

# Without a maximum subtracted, a row is exact as long as its target's exponential and the sum of
# all stay within these: quotients of them and products with hidden states are then normal numbers.
SAFE_LOW, SAFE_HIGH = 2.0**-60, 2.0**60

# Exponentials in bfloat16 are added up in groups of so many.
GROUP = 32


@dataclass(frozen=True)
class ExitScores:
    """Cross-entropy at every exit, in the order in which the exits were given.

    nll_e: (exits,) sum over tokens of the cross-entropy in nats; float64 (float32 on MPS, which has
        no float64), detached, on the device.
    correct_e: (exits,) int64, tokens whose most likely next token is the target; of equally likely
        ones the first counts. All zero when counting was switched off.
    """

    nll_e: Tensor
    correct_e: Tensor


@dataclass(frozen=True)
class ExitLosses(ExitScores):
    """The same with a loss to differentiate.

    loss: scalar; the sum over exits of weight x mean over tokens (nats), float32 (float64 for
        float64 hidden states).
    """

    loss: Tensor


def linear_cross_entropy(
    hidden_end: Sequence[Tensor],
    head_vd: Tensor,
    target_n: Tensor,
    weight_e: Sequence[float],
    *,
    count: bool = True,
    workspace: Workspace | None = None,
) -> ExitLosses:
    """Cross-entropy of `hidden @ head.T` against the targets at each exit, and its weighted sum.

    hidden_end: per exit a (tokens, dim) tensor, float32, bfloat16 or float64, contiguous or not.
        Gradients go to those that require them; the others may come from `torch.no_grad` or
        `torch.inference_mode`.
    head_vd: (vocab, dim), the head's weight; gets a gradient if it requires one.
    target_n: (tokens,) int64.
    weight_e: the weight of each exit in the loss. An exit of weight 0 sends no gradient.
    count: whether to count correct predictions, which costs one more pass over the logits.
    workspace: the buffer to reuse from call to call, and how the work is cut.

    Products are formed in the dtype of autocast where it is on, otherwise in that of the hidden
    states; exponentials and sums at least in float32. Each gradient has the dtype of its tensor.

    The gradients are made in the forward pass and handed over by the backward pass: there is no
    second one through the same loss, also with `retain_graph`.
    """
    job = _Loss(hidden_end, head_vd, target_n, weight_e, count, workspace or Workspace())
    loss, nll_e, correct_e = _LinearCrossEntropy.apply(job, head_vd, *hidden_end)
    return ExitLosses(nll_e, correct_e, loss)


def evaluate_exits(
    hidden_end: Sequence[Tensor],
    head_vd: Tensor,
    target_n: Tensor,
    workspace: Workspace | None = None,
) -> ExitScores:
    """Summed cross-entropy and correct predictions at each exit: one product, no gradients.

    Arguments as of `linear_cross_entropy`.
    """
    dtype = None
    if head_vd.device.type == "cpu":
        # In bfloat16 the most likely tokens tie, and the loss that selects an epoch is rounded.
        dtype = torch.promote_types(head_vd.dtype, torch.float32)
    weights = [0.0] * len(hidden_end)
    with torch.no_grad():
        job = _Loss(hidden_end, head_vd, target_n, weights, True, workspace or Workspace(), dtype)
        _, nll_e, correct_e, _ = job.run()
    return ExitScores(nll_e, correct_e)


# The loss; of each exit the summed cross-entropy and the correct predictions; the gradients of the
# head and of each hidden state.
_Result = tuple[Tensor, Tensor, Tensor, list[Tensor | None]]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, job: _Loss, *_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        loss, nll_e, correct_e, ctx.gradients = job.run()
        ctx.mark_non_differentiable(nll_e, correct_e)
        return loss, nll_e, correct_e

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        # Handed over, not kept: a kept reference would make autograd copy the head's gradient.
        gradients, ctx.gradients = ctx.gradients, None
        # Elsewhere than on the CPU, looking at the value would wait for the device.
        if loss_grad.device.type != "cpu" or loss_grad.item() != 1.0:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(loss_grad)
        return (None, *gradients)


@dataclass(frozen=True)
class _Block:
    """A block of the vocabulary as a chunk sees it, cut into parts.

    exponentials_pvm: (parts, entries of a part, rows), first the logits in base 2, then two to
        their power, with that of the targets left out.
    head_pvd, head_grad_pvd: its weights, (parts, entries of a part, dim), and their gradient.
    """

    exponentials_pvm: Tensor
    head_pvd: Tensor
    head_grad_pvd: Tensor | None


@dataclass
class _Sums:
    """What a way through the vocabulary gives for each row of a chunk.

    rest, target: the sum of the exponentials of all entries but the target, and that of the target.
    nll: cross-entropy, nats.
    weighted_dm: (dim, rows) the sum of exponential x weights, over all entries but the target.
    correct: whether the target is the most likely token, where that is counted.
    """

    rest: Tensor
    target: Tensor
    nll: Tensor
    weighted_dm: Tensor | None
    correct: Tensor | None


class _Loss:
    """One call: the tokens of all exits, stacked, in chunks of rows.

    Stacking reads the head's weights once per chunk, whatever the number of exits. Exits that need
    the same gradients form a group, and their rows are sorted by target: the targets of a chunk
    then lie in few blocks of the vocabulary, and the others need not be searched for them.

    dtype: of the products; None for that of autocast or of the hidden states.
    """

    def __init__(
        self,
        hidden_end: Sequence[Tensor],
        head_vd: Tensor,
        target_n: Tensor,
        weight_e: Sequence[float],
        count: bool,
        workspace: Workspace,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.hidden_end, self.head_vd, self.target_n = hidden_end, head_vd, target_n
        self.weight_e, self.count, self.workspace = weight_e, count, workspace
        recording = torch.is_grad_enabled()
        self.head_needs = recording and head_vd.requires_grad
        self.hidden_needs = [recording and hidden_nd.requires_grad for hidden_nd in hidden_end]
        kind = head_vd.device.type
        has_autocast = torch.amp.is_autocast_available(kind)
        if dtype is None:
            dtype = functools.reduce(torch.promote_types, [h.dtype for h in hidden_end])
            if has_autocast and torch.is_autocast_enabled(kind) and dtype != torch.float64:
                dtype = torch.get_autocast_dtype(kind)
        self.device, self.tokens, self.on_cpu = head_vd.device, len(target_n), kind == "cpu"
        # Of a block's entries, and of the products with them.
        self.parts = torch.get_num_threads() if self.on_cpu else 1
        # Of products; and of exponentials, sums and gradients under way.
        self.dtype, self.sum_dtype = dtype, torch.promote_types(dtype, torch.float32)
        self.head = head_vd.detach().to(dtype)
        # Of kept exponentials: bfloat16 with its products on a CPU, where conversions would take
        # longer than the products.
        self.kept_dtype = dtype if self.on_cpu else self.sum_dtype
        # What is rounded to 8 bits, be it by 0.03, is an error of the loss only at the target: its
        # logit and its part of the head's gradient are formed apart.
        self.rounded = self.kept_dtype != self.sum_dtype
        self.at_targets: list[tuple[Tensor, Tensor]] = []
        # Whether a chunk was seen whose sums come too near the limits with nothing subtracted.
        self.beyond = False
        self.head_grad_vd = self.empty(*head_vd.shape) if self.head_needs else None
        self.head_grad_begun = False
        # The blocks under way, and the hidden states (rows, dim) whose product with the kept
        # exponentials is still to be added to the head's gradient.
        self.blocks: list[_Block] = []
        self.waiting_md: Tensor | None = None
        # In `run` every dtype is chosen by hand.
        self.by_hand = torch.autocast(kind, enabled=False) if has_autocast else nullcontext()

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.sum_dtype, device=self.device)

    def run(self) -> _Result:
        """The loss at every exit, and the gradients that are asked for."""
        exits = range(len(self.hidden_end))
        # MPS has no float64.
        wide = torch.float32 if self.device.type == "mps" else torch.float64
        nll_e = torch.zeros(len(exits), dtype=wide, device=self.device)
        correct_e = torch.zeros(len(exits), dtype=torch.int64, device=self.device)
        gradients: list[Tensor | None] = [None] * len(exits)
        with self.by_hand:
            for to_hidden in sorted(set(self.hidden_needs), reverse=True):
                members = [e for e in exits if self.hidden_needs[e] == to_hidden]
                nll_m, correct_m, grad_md = self.group(members, to_hidden)
                for i, e in enumerate(members):
                    rows = slice(i * self.tokens, (i + 1) * self.tokens)
                    nll_e[e] = nll_m[rows].sum(dtype=wide)
                    correct_e[e] = correct_m[rows].sum()
                    if grad_md is not None:
                        gradients[e] = grad_md[rows].to(self.hidden_end[e].dtype)
        loss = torch.zeros((), dtype=wide, device=self.device)
        for weight, nll in zip(self.weight_e, nll_e, strict=True):
            loss += weight / self.tokens * nll
        head_grad = self.head_grad_vd
        if head_grad is not None:
            for target, grad_md in self.at_targets:
                head_grad.index_add_(0, target, grad_md)
            head_grad = head_grad.to(self.head_vd.dtype)
        return loss.to(self.sum_dtype), nll_e, correct_e, [head_grad, *gradients]

    def group(self, members: list[int], to_hidden: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Cross-entropy, whether correct, and gradient of the rows of exits with the same needs."""
        target_m = self.target_n.repeat(len(members))
        order = target_m.argsort(stable=True)
        target_m = target_m[order]
        kind = self.sum_dtype if self.rounded else self.dtype
        hidden_md = torch.cat([self.hidden_end[e].detach().to(kind) for e in members])[order]
        weights = [self.empty(self.tokens).fill_(self.weight_e[e]) for e in members]
        scale_m = torch.cat(weights).div_(self.tokens)[order]

        total = len(target_m)
        nll_m = self.empty(total)
        correct_m = torch.zeros(total, dtype=torch.bool, device=self.device)
        grad_md = self.empty(*hidden_md.shape) if to_hidden else None
        entries, keep, device = len(self.head), self.head_needs, self.device.type
        size = self.workspace.rows or chunk_rows(total, entries, keep, self.sum_dtype, device)
        for first in range(0, total, size):
            rows = slice(first, min(first + size, total))
            hidden, target = hidden_md[rows], target_m[rows]
            if first == 0 or rows.stop - first != size:
                self.cut(len(target))
            sums = self.sums(hidden, target, to_hidden)
            nll_m[rows] = sums.nll
            if sums.correct is not None:
                correct_m[rows] = sums.correct
            share = scale_m[rows] / (sums.rest + sums.target)
            if grad_md is not None:
                assert sums.weighted_dm is not None
                torch.mul(sums.weighted_dm.t(), share.unsqueeze(1), out=grad_md[rows])
                toward = self.toward(target)
                grad_md[rows].addcmul_(toward, (share * sums.rest).unsqueeze(1), value=-1)
            if keep:
                scaled = hidden * share.unsqueeze(1)
                if self.rounded:
                    self.at_targets.append((target, scaled * -sums.rest.unsqueeze(1)))
                # Softmax minus one-hot, times the sum; one element a row, so the order cannot
                # matter.
                one_hot = 0.0 if self.rounded else -sums.rest
                kept = self.buffer(entries, len(target))
                kept[target, torch.arange(len(target), device=self.device)] = one_hot
                self.waiting_md = scaled.to(self.dtype)
        self.add_waiting()

        back = torch.empty_like(order)
        back[order] = torch.arange(total, device=self.device)
        return nll_m[back], correct_m[back], None if grad_md is None else grad_md[back]

    def toward(self, target: Tensor) -> Tensor:
        """The head's rows of the targets, (rows, dim)."""
        head = self.head_vd.detach() if self.on_cpu else self.head
        return head[target].to(self.sum_dtype)

    def cut(self, rows: int) -> None:
        """Cut the vocabulary into blocks for chunks of so many rows; each has room of its own if
        they are to be kept for the head's gradient.
        """
        self.add_waiting()
        vocab, entries, keep = len(self.head), len(self.head), self.head_needs
        if self.on_cpu:
            entries = self.workspace.block or block_entries(rows, vocab, self.kept_dtype, "cpu")
        buffer = self.buffer(vocab if keep else min(entries, vocab), rows)
        self.blocks = []
        for v in range(0, vocab, entries):
            w = min(v + entries, vocab)
            shape = (self.parts if (w - v) % self.parts == 0 else 1, -1)
            exponentials_vm, grad_vd = buffer[v:w] if keep else buffer[: w - v], self.head_grad_vd
            self.blocks.append(
                _Block(
                    exponentials_vm.unflatten(0, shape),
                    self.head[v:w].unflatten(0, shape),
                    None if grad_vd is None else grad_vd[v:w].unflatten(0, shape),
                )
            )

    def buffer(self, entries: int, rows: int) -> Tensor:
        """The (entries, rows) buffer for the exponentials that are kept."""
        like = self.head.new_empty(0, dtype=self.kept_dtype)
        return self.workspace.buffer(entries, rows, like)

    def sums(self, hidden: Tensor, target: Tensor, to_hidden: bool) -> _Sums:
        """The sums of a chunk, with as little subtracted from its logits as will do."""
        # Logits in base 2 are those of a hidden state scaled by log2 e. In bfloat16 that would
        # round once more, so there the logits are scaled.
        hidden_dm = hidden * LOG2_E if hidden.dtype == self.sum_dtype else hidden
        hidden_dm = hidden_dm.t().contiguous().to(self.dtype)
        if self.on_cpu:
            exact = (hidden * self.toward(target)).sum(1) * LOG2_E
            self.beyond |= bool((exact.exp2() > SAFE_HIGH).any())
            if not self.beyond:
                sums = self.through(hidden_dm, target, to_hidden, exact, None)
                if sums is not None:
                    return sums
            if self.kept_dtype != self.sum_dtype:
                # What is subtracted needs more bits: on with float32 exponentials.
                self.add_waiting()
                self.kept_dtype = self.sum_dtype
                self.cut(len(target))
            if self.beyond:
                sums = self.through(hidden_dm, target, to_hidden, exact, exact)
                if sums is not None:
                    return sums
        largest, index = self.largest(hidden_dm)
        sums = self.through(hidden_dm, target, to_hidden, None, largest, index)
        assert sums is not None
        return sums

    def through(
        self,
        hidden_dm: Tensor,
        target: Tensor,
        to_hidden: bool,
        exact: Tensor | None,
        shift: Tensor | None,
        index: Tensor | None = None,
    ) -> _Sums | None:
        """One way through the vocabulary, block by block, with `shift` subtracted from the logits.

        target: sorted.
        exact: the targets' logits, for where those of the products are rounded.
        index: the most likely token, where `shift` is its logit. Otherwise the result is None if
            sums came too near the limits, or where there is a tie.
        """
        rows, blocks = len(target), len(self.blocks)
        # The last block may have fewer parts than the others.
        sums_bpm = self.empty(blocks, self.parts, rows).zero_()
        best_bpm = self.empty(blocks, self.parts, rows).fill_(-math.inf)
        weighted_pdm = self.empty(self.parts, len(hidden_dm), rows).zero_() if to_hidden else None
        counts = self.count and index is None
        formed = index is not None and blocks == 1  # by `largest`
        target_logits = []
        for block, place, sum_pm, best_pm in zip(
            self.blocks, self.places(target), sums_bpm, best_bpm, strict=True
        ):
            exponentials, parts = block.exponentials_pvm, len(block.exponentials_pvm)
            if not formed:
                self.form_logits(block, hidden_dm)
            if shift is not None:
                exponentials.sub_(shift)
            if len(place):
                # The target is left out of everything here, and put in below.
                flat = exponentials.view(-1)
                target_logits.append(flat[place])
                flat.index_fill_(0, place, -math.inf)
            if counts:
                best_pm[:parts] = exponentials.amax(1)
            exponentials.exp2_()
            self.add_up(exponentials, sum_pm[:parts])
            if weighted_pdm is not None:
                self.accumulate(weighted_pdm[:parts], block.head_pvd.mT, exponentials)

        target_logit = torch.cat(target_logits)
        if self.rounded and exact is not None:
            target_logit = exact if shift is None else exact - shift
        rest, target_exponential = sums_bpm.sum((0, 1)), target_logit.exp2()
        total = rest + target_exponential
        weighted_dm = None if weighted_pdm is None else weighted_pdm.sum(0)
        if index is not None:
            nll = (total.log2() - target_logit) * LN_2
            correct = index == target if self.count else None
            return _Sums(rest, target_exponential, nll, weighted_dm, correct)
        # A NaN fails this too.
        if not bool(((target_exponential >= SAFE_LOW) & (total <= SAFE_HIGH)).all()):
            self.beyond = True
            return None
        correct = None
        if counts:
            rival = best_bpm.amax((0, 1))
            if bool((target_logit == rival).any()):
                return None
            correct = target_logit > rival
        nll = torch.log2(total / target_exponential) * LN_2
        return _Sums(rest, target_exponential, nll, weighted_dm, correct)

    def largest(self, hidden_dm: Tensor) -> tuple[Tensor, Tensor]:
        """Each row's largest logit in base 2, and the first token that has it."""
        best, index, first = self.empty(0), torch.empty(0), 0
        for block in self.blocks:
            self.form_logits(block, hidden_dm)
            logit, place = block.exponentials_pvm.flatten(0, 1).max(0)
            if first == 0:
                best, index = logit, place
            else:
                index = torch.where(logit > best, place + first, index)
                best = torch.maximum(best, logit)
            first += block.exponentials_pvm.shape[:2].numel()
        return best, index

    def places(self, target: Tensor) -> Sequence[Tensor]:
        """Where the targets lie in the memory of each block."""
        rows = len(target)
        column = torch.arange(rows, device=self.device)
        if len(self.blocks) == 1:
            return [target * rows + column]
        entries = self.blocks[0].exponentials_pvm.shape[:2].numel()
        counts = torch.bincount(target // entries, minlength=len(self.blocks)).tolist()
        return (target % entries * rows + column).split(counts)

    def form_logits(self, block: _Block, hidden_dm: Tensor) -> None:
        """Form the block's logits, in base 2, once the exponentials there are used up."""
        self.add_waiting(block)
        out = block.exponentials_pvm
        hidden_pdm = hidden_dm.expand(len(out), *hidden_dm.shape)
        if out.dtype == self.dtype:
            torch.bmm(block.head_pvd, hidden_pdm, out=out)
            return
        out.copy_(torch.bmm(block.head_pvd, hidden_pdm))
        if not self.on_cpu:
            out.mul_(LOG2_E)

    def add_waiting(self, block: _Block | None = None) -> None:
        """Add to the head's gradient what is kept of the chunk before in this block, or in all."""
        if self.waiting_md is None:
            return
        for each in self.blocks if block is None else [block]:
            assert each.head_grad_pvd is not None
            waiting_pmd = self.waiting_md.expand(len(each.head_pvd), *self.waiting_md.shape)
            first = not self.head_grad_begun
            self.accumulate(each.head_grad_pvd, each.exponentials_pvm, waiting_pmd, first)
        if block is None or block is self.blocks[-1]:
            self.head_grad_begun, self.waiting_md = True, None

    def add_up(self, exponentials_pvm: Tensor, out_pm: Tensor) -> None:
        """The sums over a block's entries, written to `out_pm`.

        Those of bfloat16 in small groups: each sum is rounded, up or down as it comes, and an
        output in float32 would convert all of them first.
        """
        if exponentials_pvm.dtype == self.sum_dtype:
            torch.sum(exponentials_pvm, 1, out=out_pm)
            return
        whole = exponentials_pvm.shape[1] // GROUP * GROUP
        groups = exponentials_pvm[:, :whole].unflatten(1, (-1, GROUP)).sum(2)
        torch.sum(groups.to(self.sum_dtype), 1, out=out_pm)
        out_pm += exponentials_pvm[:, whole:].to(self.sum_dtype).sum(1)

    def accumulate(self, total: Tensor, left: Tensor, right: Tensor, first: bool = False) -> None:
        """total += left @ right, part by part; the first time, = instead."""
        if self.dtype == self.sum_dtype:
            torch.bmm(left, right, out=total) if first else total.baddbmm_(left, right)
        else:
            product = torch.bmm(left.to(self.dtype), right.to(self.dtype))
            total.copy_(product) if first else total.add_(product)
