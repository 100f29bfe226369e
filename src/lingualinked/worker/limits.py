"""The cores, threads and memory that a worker may use, and what it uses of them.

Knows the operating system's calls; not what is computed.
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import psutil
import torch

from lingualinked.model.memory import use_one_heap
from lingualinked.processor import processor_name
from lingualinked.quantities import count_text

# What a stage needs beyond its weights, KV and activations: message buffers and allocator arenas; and each thread's stack.
_OVERHEAD_BYTES = 192 * 1024**2
_THREAD_BYTES = 8 * 1024**2


def apply_limits(threads: int, cpus: tuple[int, ...] | None, memory_bytes: int | None) -> None:
    """Set threads and cores, and make the kernel refuse memory beyond the limit (on Linux)."""
    if cpus is not None:
        os.sched_setaffinity(0, cpus)
    torch.set_num_threads(threads)
    use_one_heap()  # weights are loaded in another thread
    if memory_bytes is not None and sys.platform == "linux":
        import resource

        limit = _data_bytes() + memory_bytes + _OVERHEAD_BYTES + threads * _THREAD_BYTES
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def resident_bytes() -> int:
    """Return the resident memory of this process, in bytes."""
    return int(psutil.Process().memory_info().rss)


def free_bytes(accelerator: str) -> int:
    """Return the free memory of a device, in bytes; on a CPU, all that the machine has available."""
    if accelerator.startswith("cuda"):
        if not torch.cuda.is_available():  # loading a stage will raise
            return 0
        return int(torch.cuda.mem_get_info(accelerator)[0])
    return int(psutil.virtual_memory().available)


def spare_bytes(accelerator: str) -> int:
    """Return the memory that this worker can still allocate, in bytes: free memory within its limit."""
    free = free_bytes(accelerator)
    if accelerator != "cpu" or sys.platform != "linux":
        return free
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_DATA)
    return free if limit == resource.RLIM_INFINITY else min(free, max(0, limit - _data_bytes()))


def describe_hardware(accelerator: str) -> str:
    """Describe the processor or accelerator in a few words."""
    if accelerator.startswith("cuda"):
        return torch.cuda.get_device_name(accelerator)
    return f"{processor_name()}, {torch.backends.cpu.get_cpu_capability()}, {count_text(torch.get_num_threads(), 'thread')}"


def _data_bytes() -> int:
    """Return the private writable memory of this process, as ``RLIMIT_DATA`` counts it."""
    with Path("/proc/self/status").open() as status:
        for line in status:
            if line.startswith("VmData:"):
                return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmData")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception means that memory could not be allocated."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "bad_alloc" in text)
