"""Work goes in; what it cost comes out: memory above what was there before, and seconds."""

import ctypes
import gc
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

MIB = 1 << 20
_STATUS = Path("/proc/self/status")


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What a piece of work took.

    peak_mib, kept_mib: memory above that before, at most and when it is done busy_s, wall_s: CPU
    seconds of all threads, or seconds by the GPU's own clock; and by the clock on the wall
    """

    peak_mib: float
    kept_mib: float
    busy_s: float
    wall_s: float


def cost(work: Callable[[], object], device: torch.device) -> Cost:
    """Do the work once."""
    gc.collect()
    return _on_gpu(work) if device.type == "cuda" else _on_cpu(work)


def _on_cpu(work: Callable[[], object]) -> Cost:
    if sys.platform != "linux":
        raise RuntimeError("peak memory on a CPU is measured through /proc, which Linux alone has")
    # What malloc holds back from earlier work would hide the first part of this one's.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM is VmRSS from here on
    before_mib = _status_mib("VmRSS")
    cpu_began, wall_began = time.process_time(), time.perf_counter()
    work()
    busy_s, wall_s = time.process_time() - cpu_began, time.perf_counter() - wall_began
    peak_mib = _status_mib("VmHWM") - before_mib
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    kept_mib = _status_mib("VmRSS") - before_mib
    return Cost(peak_mib=peak_mib, kept_mib=kept_mib, busy_s=busy_s, wall_s=wall_s)


def _status_mib(field: str) -> float:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def _on_gpu(work: Callable[[], object]) -> Cost:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    event: Any = torch.cuda.Event  # which has no types
    began, ended = event(enable_timing=True), event(enable_timing=True)
    wall_began = time.perf_counter()
    began.record()
    work()
    ended.record()
    torch.cuda.synchronize()
    return Cost(
        peak_mib=(torch.cuda.max_memory_allocated() - before) / MIB,
        kept_mib=(torch.cuda.memory_allocated() - before) / MIB,
        busy_s=began.elapsed_time(ended) / 1e3,
        wall_s=time.perf_counter() - wall_began,
    )
