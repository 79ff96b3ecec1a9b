"""One process of several that `torchrun` or `accelerate launch` started; alone, it is all of them.

    torchrun --nproc_per_node 2 train.py --data data/scenes             on CPUs, or on as many GPUs
    accelerate launch --num_processes 2 train.py --data data/scenes     on GPUs

accelerate does the work. What is here is what it leaves open: that several processes without a GPU are to
compute on CPUs together, and how long one waits for another.
"""

from __future__ import annotations

from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import get_cpu_distributed_information

# Shares of a long pass over photos end hours apart where one process reads from a slower disk. A process that is
# gone is noticed at once, whatever this is.
PATIENCE = timedelta(days=1)


def on_cpus() -> bool:
    """Whether several processes were started where there is no GPU: accelerate must be told to use CPUs."""
    return get_cpu_distributed_information().world_size > 1 and not torch.cuda.is_available()


def this_process() -> PartialState:
    """This process's index, device and ways to wait for the others; the first call joins them."""
    return PartialState(cpu=on_cpus(), timeout=PATIENCE)


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the processor or GPU computes faster in it, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "cpu":
        can = torch.cpu.get_capabilities()
        return torch.bfloat16 if can.get("avx512_bf16") or can.get("amx_bf16") else torch.float32
    return torch.float32


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context of a forward pass: bfloat16 if `precision` is "bf16", or "auto" and it is faster on this device."""
    dtype = fast_dtype(device) if precision == "auto" else torch.bfloat16
    return torch.autocast(device.type, torch.bfloat16, enabled=precision != "fp32" and dtype == torch.bfloat16)
