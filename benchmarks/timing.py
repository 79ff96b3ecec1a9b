"""Rates, profiles, and the name of the device."""

from __future__ import annotations

import os
import platform
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")


def log(text: str) -> None:
    """Report progress on stderr."""
    print(f"... {text}", file=sys.stderr, flush=True)


def device_name() -> str:
    """Return the name of the GPU, or of the processor with the number of its cores."""
    if GPU:
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
    name = names[0].strip() if names else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def seconds_of(work: Callable[[], object]) -> float:
    """Return the seconds until the work is done, also on the GPU."""
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if GPU:
        torch.cuda.synchronize()


def best_rates(turns: Mapping[str, Callable[[], int]], repeats: int) -> dict[str, float]:
    """Return the best rate of each function in items per second; a function returns the number of items it processed.

    The functions take turns, so that other load on the machine affects all of them equally.
    """
    rates = dict.fromkeys(turns, 0.0)
    for _ in range(repeats):
        for name, work in turns.items():
            items: list[int] = []
            seconds = seconds_of(lambda work=work, items=items: items.append(work()))
            rates[name] = max(rates[name], items[0] / seconds)
    return rates


def top_operations(work: Callable[[], object], count: int = 12) -> dict[str, list[dict[str, Any]]]:
    """Profile the operations with the most self time, on the CPU and on the GPU: name, seconds, share, calls."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if GPU else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        work()
    top = {}
    for place in ("cpu", "device")[: len(activities)]:
        self_time = f"self_{place}_time_total"  # in microseconds
        spent = {e.key: (getattr(e, self_time) / 1e6, e.count) for e in profiler.key_averages()}
        total = sum(seconds for seconds, _ in spent.values())
        order = sorted(spent.items(), key=lambda item: -item[1][0])[:count]
        top[place] = [
            {"operation": key, "seconds": seconds, "share": seconds / total, "calls": calls}
            for key, (seconds, calls) in order
        ]
    return top
