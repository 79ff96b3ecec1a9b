"""Devices, memory and precision, of one process or of several that were launched together.

    torchrun --nproc_per_node 2 train.py --data data/scenes             on two GPUs, or on CPUs where there is none
    accelerate launch --num_processes 2 train.py --data data/scenes     on two GPUs

accelerate does the work. This module makes several processes without a GPU use CPUs, and sets how long a process waits
for the others.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable
from datetime import timedelta
from functools import cache

import torch
from accelerate import PartialState
from accelerate.utils import get_cpu_distributed_information

from captioning.errors import InputError

# Processes that read images from disks of different speeds may finish hours apart. A process that exits is noticed at
# once, whatever the timeout.
TIMEOUT = timedelta(days=1)

UNSUPPORTED = ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG")  # set by `accelerate launch`

# Of glibc's mallopt: its parameters, and their values in bytes.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT, MAPPED = 1 << 30, 1 << 28


def on_cpus() -> bool:
    """Return whether several processes were launched without a GPU; accelerate must then be told to use CPUs."""
    return get_cpu_distributed_information().world_size > 1 and not torch.cuda.is_available()


def this_process() -> PartialState:
    """Return accelerate's state of this process (index, device, barrier); the first call connects the processes.

    Raises `InputError` for more processes than GPUs, if there are any.
    """
    keep_freed_memory()
    require_data_parallel(["DEEPSPEED"])  # which fails at once; the others matter in training only
    launched, gpus = get_cpu_distributed_information().local_world_size, torch.cuda.device_count()
    has_own = gpus == 1 and "CUDA_VISIBLE_DEVICES" in os.environ  # the launcher may give each process its own GPU
    if launched > gpus > 0 and not has_own:
        raise InputError(f"{launched} processes were launched on a machine with {gpus} GPU(s); launch one per GPU.")
    return PartialState(cpu=on_cpus(), timeout=TIMEOUT)


def require_data_parallel(others: Iterable[str] = UNSUPPORTED) -> None:
    """Raise `InputError` if the settings of `accelerate config` choose one of these other ways of training."""
    for name in others:
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise InputError(f"the settings of accelerate choose {name}, which is not supported; launch with torchrun.")


@cache
def keep_freed_memory() -> None:
    """Make glibc keep freed memory, up to `KEPT` bytes, for the next tensors.

    By default it returns each large tensor's memory to the system, and the page faults of the next one cost up to a
    third of a backbone's time on a CPU. Tensors of more than `MAPPED` bytes are still returned.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None and mallopt(M_MMAP_THRESHOLD, MAPPED):  # an older glibc refuses so large a threshold
        mallopt(M_TRIM_THRESHOLD, KEPT)


def fast_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 if the device computes in it natively, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "cpu":
        can = torch.cpu.get_capabilities()
        return torch.bfloat16 if can.get("avx512_bf16") or can.get("amx_bf16") else torch.float32
    return torch.float32


def choose_dtype(device: torch.device, precision: str) -> torch.dtype:
    """Return bfloat16 for "bf16", float32 for "fp32", and for "auto" the faster of both on this device."""
    return {"bf16": torch.bfloat16, "fp32": torch.float32}.get(precision) or fast_dtype(device)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the context of a forward pass, in bfloat16 where `choose_dtype` says so."""
    return torch.autocast(device.type, torch.bfloat16, enabled=choose_dtype(device, precision) == torch.bfloat16)
