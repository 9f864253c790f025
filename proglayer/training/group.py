"""Processes that train one model together, each on its share of every batch.

The first (rank 0) leads: it alone has the store and the record, and decides what comes next. The
others follow its orders (`Group.orders`). An order goes through the key-value store of the
rendezvous, as who waits for one may wait for hours. Weights, gradients and sums go by the
collectives of torch.distributed, gloo on CPUs and nccl between GPUs.

Each step, and the end of each evaluation, begins with a meeting (`Group.meet`), where any process
says that a signal came, and the first that it has left. So all stop after the same step.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import time
import types
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# Before a group is there: its functions would keep that group, and its threads, to the end of the
# process, where they abort it now and then.
import torch.distributed.nn
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from proglayer.errors import ConfigError, UserError, first_line

# What the first says at a meeting when it has left: more than the number of any signal.
LEFT = 1_000
# A gradient of so many numbers is summed where it is; smaller ones go together, in one tensor.
LARGE = 2**18


class Broken(UserError):
    """Another process of the group is gone."""


@contextlib.contextmanager
def joined(
    device: torch.device, timeout_s: float, about: Mapping[str, str | None] | None = None
) -> Iterator[Group]:
    """Join the group that the environment names (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), as
    `torchrun` sets it. When the block of the first ends, the others get no more orders.

    about: what a process tells of itself: its `host`, its `gpu`, and what `Group.agree` compares.

    Raises ConfigError where the processes do not find each other within `timeout_s` seconds.
    """
    address = ":".join(os.environ.get(f"MASTER_{part}", "?") for part in ("ADDR", "PORT"))
    try:
        until = time.monotonic() + timeout_s
        store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=timeout_s)))
        store.set(f"joined/{rank}", json.dumps(about or {}))
        names = [f"joined/{each}" for each in range(size)]
        while not store.check(names):  # to wait in the library would keep signals out
            if time.monotonic() > until:
                raise RuntimeError("not all came")
            time.sleep(0.05)
        members = [json.loads(store.get(name)) for name in names]
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"MASTER_ADDR:MASTER_PORT={address}: the processes of this run do not meet there "
            f"within join_timeout_s={timeout_s:g} ({first_line(error)})"
        ) from error
    group = Group(store, rank, size, device, members)
    try:
        yield group
    finally:
        with contextlib.suppress(Broken):
            group.end()
        if group.ended or device.type != "cuda":
            dist.destroy_process_group()
        else:  # to destroy it would wait for sums between GPUs that nobody joins any more
            dist.distributed_c10d._abort_process_group()


class Group:
    """The processes of a run, as each of them sees them: it is number `rank` of `size`.

    store: the `torch.distributed.Store` that the processes met at.
    members: what each told of itself when it joined.
    stop: its `signal` is the name of one that this process got, or, once they met, any of them.
    ended: whether all parted at the end of their work.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        size: int,
        device: torch.device,
        members: Sequence[Mapping[str, str | None]] = (),
    ) -> None:
        self.rank, self.size, self.device, self.members = rank, size, device, members
        self.stop: Any = types.SimpleNamespace(signal=None)
        self.ended = False
        self._store, self._numbers = store, itertools.count()
        # Where the others wait, for the first: for an order, at the next step's meeting, or, while
        # both work on something, at one of its collectives.
        self._at_step = self._within = False

    def agree(self, about: Mapping[str, str | None]) -> None:
        """See that the others joined with the same, and each with a GPU of its own. Of the first
        alone, before anything is sent. Raises ConfigError.
        """
        for gpu, count in Counter(member.get("gpu") for member in self.members).items():
            if gpu and count > 1:
                raise ConfigError(
                    f"devices={self.size}: {count} processes have one GPU ({gpu}): start as many "
                    "on each machine as it has GPUs"
                )
        for rank, member in enumerate(self.members[1:], start=1):
            if others := [name for name in about if member.get(name) != about[name]]:
                raise ConfigError(
                    f"process {rank} of this run, on {member['host']}, differs from the first in "
                    f"{', '.join(others)}: give all the same command, code and data"
                )

    # -- orders -----------------------------------------------------------------------------------

    def order(self, what: str, *about: Any, tensors: Mapping[str, Tensor] | None = None) -> None:
        """Have the others do something; an epoch under way they leave. Of the first alone."""
        if self._at_step:
            self._meet(LEFT)
        self._at_step, self._within = False, what == "evaluate"
        tensors = tensors or {}
        listed = [(n, str(t.dtype).split(".")[1], [*t.shape]) for n, t in tensors.items()]
        with _together():
            self._store.set(f"order/{next(self._numbers)}", json.dumps((what, about, listed)))
        for tensor in tensors.values():
            self._broadcast(tensor.detach().to(self.device).contiguous())

    def orders(self) -> Iterator[tuple[str, list[Any], dict[str, Tensor]]]:
        """Give the orders of the first until there are no more: what is to be done, what it needs
        to know, and the tensors that came with it.
        """
        while True:
            key, tensors = f"order/{next(self._numbers)}", {}
            with _together():
                self._store.wait([key], timedelta(days=20))  # more milliseconds do not fit
                what, about, listed = json.loads(self._store.get(key))
            for name, dtype, shape in listed:
                tensors[name] = torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)
                self._broadcast(tensors[name])
            if what == "end":
                self.meet()
                self.ended = True
                return
            yield what, about, tensors

    def end(self) -> None:
        """Let the others go, unless they wait in the middle of something: then they see this
        process end.
        """
        if self.rank == 0 and not self._within:
            self.order("end")
            self.meet()
            self.ended = True

    # -- collectives ------------------------------------------------------------------------------

    def meet(self) -> bool:
        """Begin a step. Returns whether the first is still there."""
        name = self.stop.signal
        self._at_step, self._within = False, True
        word = self._meet(signal.Signals[name] if name else 0)
        if 0 < word < LEFT:
            self.stop.signal = signal.Signals(word).name
        return word < LEFT

    def stepped(self, more: bool) -> None:
        """Say that a step has ended. more: another one follows."""
        self._at_step, self._within = more, False

    def share(self, window_n: Tensor, own: bool) -> Tensor:
        """The part of a batch that this process takes, perhaps none of it.

        own: windows of any batch go by their numbers, always to the same process.
        """
        if own:
            return window_n[window_n % self.size == self.rank]
        return window_n.tensor_split(self.size)[self.rank]

    def reduce(self, parameters: Sequence[Tensor], loss: Tensor) -> Tensor:
        """Make each gradient its sum over all processes, the same bits in each; gives that of
        `loss`, a scalar. All have gradients for the same parameters.
        """
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        small = [grad for grad in grads if grad.numel() < LARGE]
        flat = torch.cat([*(grad.flatten().float() for grad in small), loss.reshape(1)])
        with _together():
            for each in (*(grad for grad in grads if grad.numel() >= LARGE), flat):
                dist.all_reduce(each)
        *sums, total = flat.split([*(grad.numel() for grad in small), 1])
        for grad, summed in zip(small, sums, strict=True):
            grad.copy_(summed.view_as(grad))
        return total[0]

    def sum(self, tensor: Tensor) -> Tensor:
        """End an evaluation: the sum of a tensor over all processes."""
        self.meet()
        with _together():
            dist.all_reduce(tensor)
        self.stepped(more=False)
        return tensor

    def _meet(self, word: int) -> int:
        words = torch.tensor([word])
        with _together():
            dist.all_reduce(words, dist.ReduceOp.MAX)
        return int(words)

    def _broadcast(self, tensor: Tensor) -> None:
        with _together():
            dist.broadcast(tensor.view(-1).view(torch.uint8), src=0)


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """Say it plainly where a collective fails."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise Broken(
            f"another process of this run is gone ({first_line(error)}); the same command goes on "
            "from the last stored state"
        ) from error
