"""The machine a run is on: which device, what it is called, and switches that end with the run."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import platform
import re
import resource
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from proglayer.config import Config, ConfigError, Device, Precision
from proglayer.run.record import Environment, PeakMemory, Scheduler
from proglayer.run.signals import on_signals
from proglayer.store.entries import Machine


def pick_device(wanted: Device, precision: Precision) -> torch.device:
    """The device that the setting means here.

    Raises ConfigError for one that is not there, or that has no products of this precision.
    """
    available = {
        Device.cuda: torch.cuda.is_available(),
        Device.mps: torch.backends.mps.is_available(),
        Device.cpu: True,
    }
    if wanted is Device.auto:
        wanted = next(device for device, there in available.items() if there)
    if not available[wanted]:
        there = ", ".join(device.name for device, is_there in available.items() if is_there)
        raise ConfigError(f"device={wanted.name} is not available here: take auto or {there}")
    # An older GPU would compute in float32 and say nothing; 8 is Ampere.
    if precision is Precision.tf32 and (
        wanted is Device.mps
        or (wanted is Device.cuda and torch.cuda.get_device_capability()[0] < 8)
    ):
        raise ConfigError(
            "precision=tf32 needs a CPU, or an NVIDIA GPU from Ampere on, and this run is on "
            f"{wanted.name}: take precision=float32, or bfloat16"
        )
    return torch.device(wanted.name)


def bfloat16_units(products: bool = False) -> list[str]:
    """What computes in bfloat16 on this processor, by the names of its flags.

    products: of float32 factors; without AMX or ARM's the library keeps them in float32.
    """
    units = ("amx_bf16", "bf16") if products else ("amx_bf16", "avx512_bf16", "bf16")
    capabilities = torch.cpu.get_capabilities()
    return [unit for unit in units if capabilities.get(unit)]


def with_precision(config: Config) -> tuple[Config, str | None]:
    """The settings with a precision instead of `auto`, and a line that says which and why.

    Raises ConfigError for a device that is not there.
    """
    if config.precision is not Precision.auto:
        return config, None
    device = pick_device(config.device, Precision.float32)
    if device.type == "cuda" and torch.cuda.get_device_capability()[0] >= 8:  # Ampere
        picked, why = Precision.tf32, "this GPU has units for it"
    elif device.type == "cpu" and (units := bfloat16_units()):
        picked, why = Precision.bfloat16, f"this processor has {', '.join(units)}"
    else:
        picked, why = Precision.float32, f"this {device.type} has no units for less"
    line = f"precision=auto is {picked.name} here: {why}"
    return config.model_copy(update={"precision": picked}), line


def precision_warning(device: torch.device, precision: Precision) -> str | None:
    """What tells a user that float32 is faster here, from the processor's flags; None if not."""
    if device.type != "cpu" or precision is Precision.float32:
        return None
    products = precision is Precision.tf32
    if bfloat16_units(products):
        return None
    units = "amx_bf16 or bf16" if products else "amx_bf16 or avx512_bf16 or bf16"
    return (
        f"warning: precision={precision.name}: this processor has no units for it "
        f"({units}), so precision=float32 is as fast or faster"
    )


def describe_machine(device: torch.device) -> Machine:
    """What results depend on here, bit for bit; read it inside `switches`."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{_processor()} {torch.backends.cpu.get_cpu_capability()}"
    return Machine(device.type, name, torch.get_num_threads(), str(torch.__version__))


def environment() -> Environment:
    """Versions and place, for the record."""
    from proglayer import __version__

    return Environment(
        proglayer=__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        host=socket.gethostname(),
        process=os.getpid(),
        cores=os.cpu_count(),
        scheduler=_scheduler(),
    )


def _scheduler() -> Scheduler | None:
    """The scheduler that started this job, if one did."""
    if job := os.environ.get("SLURM_JOB_ID"):
        array, task = (os.environ.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
        node = os.environ.get("SLURMD_NODENAME", "")
        return Scheduler(name="slurm", job=f"{array}_{task}" if array else job, node=node)
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        context = ray.get_runtime_context()
        # Outside a task it is the process of the command, which runs no jobs.
        if task := context.get_task_id():
            return Scheduler(name="ray", job=task, node=context.get_node_id())
    return None


@contextlib.contextmanager
def switches(threads: int | None, precision: Precision) -> Iterator[None]:
    """Set what PyTorch holds process-wide for one run, then put it back: jobs share a process.

    On a GPU sums are formed in the same order every time, as they are on a CPU without being asked.
    """
    threads_before = torch.get_num_threads()
    # Not `fp32_precision`: setting that alone makes every reader of this older switch fail, the
    # compiler among them (torch 2.11-2.13).
    matmul_before = torch.get_float32_matmul_precision()
    cpu_matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    on_cpu_before = cpu_matmul.fp32_precision
    strict_before = torch.are_deterministic_algorithms_enabled()
    lenient_before = torch.is_deterministic_algorithms_warn_only_enabled()
    # A module with a property, which no type checker knows.
    filling: Any = torch.utils.deterministic
    filled_before = filling.fill_uninitialized_memory
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        if torch.cuda.is_available():
            # Attention's backward pass and the compiler would add up in any order there. cuBLAS
            # reads its variable when it starts, and without it may choose another way each time.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)
            filling.fill_uninitialized_memory = False
        # "medium" is tf32 on a GPU and bfloat16 within a float32 product on a CPU, where an
        # evaluation in bfloat16 needs it as well.
        on_cpu = precision is Precision.bfloat16 and not torch.cuda.is_available()
        inside = "medium" if precision is Precision.tf32 or on_cpu else "highest"
        torch.set_float32_matmul_precision(inside)
        yield
    finally:
        filling.fill_uninitialized_memory = filled_before
        torch.use_deterministic_algorithms(strict_before, warn_only=lenient_before)
        torch.set_float32_matmul_precision(matmul_before)
        # It was left unset, perhaps, and would not go with a later change of the older switch.
        cpu_matmul.fp32_precision = on_cpu_before
        torch.set_num_threads(threads_before)


@dataclass
class StopSignals:
    """Notes the first of the signals that ask to stop instead of ending at once.

    A second one acts as it would have without this. Outside the main thread nothing is noted.

    received: the name of the signal that asked to stop, if one did.
    scheduler: what a user's signal would have done without this, if somebody asked for it: the way
        in which a scheduler's agent learns that its job is to be put back into the queue. To be
        called once the state is stored; it may end the process.
    """

    received: str | None = None
    scheduler: Callable[[], object] | None = None

    def noted(self) -> contextlib.AbstractContextManager[None]:
        """Note signals while the block lasts."""
        return on_signals(self._note)

    def _note(self, number: int, frame: object, before: Any) -> None:
        self.received = signal.Signals(number).name
        ours = str(getattr(before, "__module__", "")).startswith("proglayer.")
        if callable(before) and not ours and self.received.startswith("SIGUSR"):
            self.scheduler = functools.partial(before, number, frame)


def reset_peak_memory(device: torch.device) -> None:
    """Start counting peak memory from zero, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mb(device: torch.device) -> PeakMemory:
    """The highest use of memory since `reset_peak_memory`."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    bytes_each = 1 if sys.platform == "darwin" else 1024
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                peak, bytes_each = int(line.split()[1]), 1024
    of_device = None
    if device.type == "cuda":
        of_device = round(torch.cuda.max_memory_allocated(device) / 1e6, 1)
    return PeakMemory(process=round(peak * bytes_each / 1e6, 1), device=of_device)


def out_of_memory(error: Exception) -> str | None:
    """What to tell a user whose settings need more memory than there is; None for other errors."""
    text = str(error)
    on_cpu = isinstance(error, RuntimeError) and re.search(
        "can't allocate memory|not enough memory", text
    )
    no_room = isinstance(error, OSError) and error.errno == errno.ENOMEM
    if not (on_cpu or no_room or isinstance(error, (torch.OutOfMemoryError, MemoryError))):
        return None
    asked = re.search(r"tried to allocate ([\d.]+ \w+)", text, re.IGNORECASE)
    return (
        f"not enough memory{f' for {asked[1]} more' if asked else ''}: lower phase.batch_size, "
        "model.dim or data.max_vocab, or run fewer jobs at once"
    )


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
