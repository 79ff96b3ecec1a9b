"""Devices and precision, of one process or of several that were launched together.

    torchrun --nproc_per_node 2 train.py --data data/scenes             on two GPUs, or on CPUs where there is none
    accelerate launch --num_processes 2 train.py --data data/scenes     on two GPUs

accelerate does the work. This module makes several processes without a GPU use CPUs, and sets how long a process waits
for the others.
"""

from __future__ import annotations

from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import get_cpu_distributed_information

# Processes that read images from disks of different speeds may finish hours apart. A process that exits is noticed at
# once, whatever the timeout.
TIMEOUT = timedelta(days=1)


def on_cpus() -> bool:
    """Return whether several processes were launched without a GPU; accelerate must then be told to use CPUs."""
    return get_cpu_distributed_information().world_size > 1 and not torch.cuda.is_available()


def this_process() -> PartialState:
    """Return accelerate's state of this process (index, device, barrier); the first call connects the processes."""
    return PartialState(cpu=on_cpus(), timeout=TIMEOUT)


def fast_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 if the processor or GPU is faster in it, else float32."""
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
