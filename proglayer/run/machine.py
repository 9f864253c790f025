"""The machine a run is on: which device, what it is called, and switches that end with the run."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from proglayer.config import Config, ConfigError, Device, Precision
from proglayer.run.environment import available_cores, place
from proglayer.store.entries import Machine

# What computes in bfloat16 on a processor, by the names of its flags.
BFLOAT16_UNITS = ("amx_bf16", "avx512_bf16", "bf16")


def pick_device(wanted: Device, precision: Precision) -> torch.device:
    """The device that the setting means here.

    Raises ConfigError for one that is not there, or that has no products of this precision.
    """
    available: dict[Device, bool] = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if wanted == "auto":
        wanted = next(device for device, there in available.items() if there)
    if not available[wanted]:
        there = ", ".join(device for device, is_there in available.items() if is_there)
        raise ConfigError(f"device={wanted} is not available here: take auto or {there}")
    # An older GPU would compute in float32 and say nothing; 8 is Ampere.
    if precision == "tf32" and (
        wanted == "mps" or (wanted == "cuda" and torch.cuda.get_device_capability()[0] < 8)
    ):
        raise ConfigError(
            "precision=tf32 needs a CPU, or an NVIDIA GPU from Ampere on, and this run is on "
            f"{wanted}: take precision=float32, or bfloat16"
        )
    return torch.device(wanted)


def with_precision(config: Config) -> tuple[Config, str | None]:
    """The settings with a precision instead of `auto`, and a line that says which and why.

    Raises ConfigError for a device that is not there.
    """
    if config.precision != "auto":
        return config, None
    device = pick_device(config.device, "float32")
    if device.type == "cuda" and torch.cuda.get_device_capability()[0] >= 8:  # Ampere
        picked, why = "tf32", "this GPU has units for it"
    elif device.type == "cpu" and any(map(torch.cpu.get_capabilities().get, BFLOAT16_UNITS)):
        picked, why = "bfloat16", "this processor has units for it"
    else:
        picked, why = "float32", f"this {device.type} has no units for less"
    line = f"precision=auto is {picked} here: {why}"
    return config.model_copy(update={"precision": picked}), line


def processes_of(config: Config) -> int:
    """How many processes share a run with these settings out, on a device each.

    Raises ConfigError for more than there are devices here, or another number than that of the
    group which this process was started in.
    """
    where, wanted = place(), config.devices
    kind = pick_device(config.device, "float32").type
    there = {"cuda": torch.cuda.device_count(), "cpu": available_cores()}.get(kind, 1)
    if wanted == "auto":
        wanted = where.size if where.size > 1 else there if kind == "cuda" else 1
    if where.size not in (1, wanted):
        raise ConfigError(
            f"devices={wanted}: this process was started as one of {where.size} of a run "
            f"(WORLD_SIZE={where.size}): give devices={where.size}, or auto"
        )
    if where.size == 1 and wanted > there:
        one = {"cuda": "GPU", "cpu": "core"}.get(kind, f"{kind} device")
        raise ConfigError(f"devices={wanted}: each takes a {one}, and there are {there} here")
    return wanted


def describe_machine(device: torch.device, processes: int = 1) -> Machine:
    """What results depend on here, bit for bit; read it inside `switches`."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{_processor()} {torch.backends.cpu.get_cpu_capability()}"
    # Between GPUs the order of a sum follows from which of them are on one machine.
    apart = device.type == "cuda" and place().size > 1
    nodes = processes // place().local_size if apart else 1
    threads, torch_version = torch.get_num_threads(), str(torch.__version__)
    return Machine(device.type, name, threads, torch_version, processes, nodes)


def places(config: Config) -> int | None:
    """Return how many jobs with these settings this machine has room for, None for any number."""
    processes = processes_of(config)
    if pick_device(config.device, "float32").type == "cuda":
        return max(1, torch.cuda.device_count() * config.jobs_per_gpu // processes)
    return None if processes == 1 else max(1, available_cores() // processes)


@contextlib.contextmanager
def gpu_of(worker: int, device: torch.device) -> Iterator[str | None]:
    """Have `cuda` mean the GPU of this worker until the block ends, and leave no memory on it that
    nothing uses. Gives its name; None on another device.

    worker: the number of the process among those that work at once on this machine. Not through
    CUDA_VISIBLE_DEVICES, which CUDA reads only once: jobs may come one after another in a process.
    """
    if device.type != "cuda":
        yield None
        return
    index = worker % torch.cuda.device_count()
    with torch.cuda.device(index):
        try:
            yield str(torch.cuda.get_device_properties(index).uuid)
        finally:
            torch.cuda.empty_cache()


@contextlib.contextmanager
def switches(threads: int | None, precision: Precision, processes: int = 1) -> Iterator[None]:
    """Set what PyTorch holds process-wide for one run, then put it back: jobs share a process.

    processes: those of the run on this machine, which share its cores out.
    On a GPU sums are formed in the same order every time, as they are on a CPU without being asked.
    """
    # Modules with a property each, which no type checker knows. Not torch's `fp32_precision`:
    # setting that alone makes every reader of the older switch fail, the compiler among them (torch
    # 2.11-2.13).
    cpu_matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    filling: Any = torch.utils.deterministic
    strict = torch.are_deterministic_algorithms_enabled()
    lenient = torch.is_deterministic_algorithms_warn_only_enabled()
    with contextlib.ExitStack() as back:
        back.callback(torch.set_num_threads, torch.get_num_threads())
        # It was left unset, perhaps, and would not go with a later change of the older switch.
        back.callback(setattr, cpu_matmul, "fp32_precision", cpu_matmul.fp32_precision)
        back.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        back.callback(torch.use_deterministic_algorithms, strict, warn_only=lenient)
        was_filled = filling.fill_uninitialized_memory
        back.callback(setattr, filling, "fill_uninitialized_memory", was_filled)
        local = place().local_size if place().size > 1 else processes
        share = max(1, available_cores() // local)
        torch.set_num_threads(threads or min(torch.get_num_threads(), share))
        if torch.cuda.is_available():
            # Attention's backward pass and the compiler would add up in any order there. cuBLAS
            # reads its variable when it starts, and without it may choose another way each time.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)
            filling.fill_uninitialized_memory = False
        # "medium" is tf32 on a GPU and bfloat16 within a float32 product on a CPU, where an
        # evaluation in bfloat16 needs it as well.
        on_cpu = precision == "bfloat16" and not torch.cuda.is_available()
        inside = "medium" if precision == "tf32" or on_cpu else "highest"
        torch.set_float32_matmul_precision(inside)
        yield


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
