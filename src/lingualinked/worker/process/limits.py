"""The cores, threads and memory that a worker may use, and what it uses of them.

Knows the operating system's calls; not what is computed.
"""

from __future__ import annotations

import errno
import os
import sys

import psutil
import torch

from lingualinked.model.process.memory import limit_memory, private_bytes, use_one_heap
from lingualinked.processor import processor_name
from lingualinked.quantities import count_text

# What a stage needs beyond its weights, KV and activations: message buffers and allocator arenas; and each thread's stack.
_OVERHEAD_BYTES = 192 * 1024**2
_THREAD_BYTES = 8 * 1024**2
# In errors of torch without a class of their own; the last two are of libraries that allocate on a GPU by themselves.
_OUT_OF_MEMORY = ("can't allocate memory", "bad_alloc", "error: out of memory", "status_alloc_failed")
# On a GPU: workspaces of matrix products, and what torch's allocator rounds up. The driver's own memory does not count.
_CUDA_OVERHEAD_BYTES = 128 * 1024**2


def apply_limits(threads: int, cpus: tuple[int, ...] | None, memory_bytes: int | None, accelerator: str) -> None:
    """Set threads and cores, and a limit beyond which memory is refused: by torch on a GPU, else by Linux's kernel."""
    if cpus is not None:
        os.sched_setaffinity(0, cpus)
    torch.set_num_threads(threads)
    use_one_heap()  # weights are loaded in another thread
    if memory_bytes is None:
        return
    if accelerator.startswith("cuda"):
        _limit_gpu(accelerator, memory_bytes + _CUDA_OVERHEAD_BYTES)
    elif sys.platform == "linux":
        limit_memory(private_bytes() + memory_bytes + _OVERHEAD_BYTES + threads * _THREAD_BYTES)


def resident_bytes() -> int:
    """Return the resident memory of this process, in bytes."""
    return int(psutil.Process().memory_info().rss)


def _limit_gpu(accelerator: str, limit_bytes: int) -> None:
    """Make torch's allocator refuse what exceeds the limit; where the GPU is missing, loading a stage will raise."""
    if _has_gpu(accelerator):
        total = torch.cuda.get_device_properties(accelerator).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit_bytes / total), accelerator)


def _has_gpu(accelerator: str) -> bool:
    return torch.cuda.is_available() and torch.device(accelerator).index < torch.cuda.device_count()


def free_bytes(accelerator: str) -> int:
    """Return the free memory of a device, in bytes: on a CPU, all that the machine has available.

    On a GPU, what torch's allocator holds in this process and does not use counts as free.
    """
    if accelerator.startswith("cuda"):
        if not _has_gpu(accelerator):  # loading a stage will raise
            return 0
        unused = torch.cuda.memory_reserved(accelerator) - torch.cuda.memory_allocated(accelerator)
        return int(torch.cuda.mem_get_info(accelerator)[0]) + unused
    return int(psutil.virtual_memory().available)


def spare_bytes(accelerator: str) -> int:
    """Return the memory that this worker can still allocate, in bytes: free memory within its limit."""
    free = free_bytes(accelerator)
    if accelerator.startswith("cuda") and _has_gpu(accelerator):
        total = torch.cuda.get_device_properties(accelerator).total_memory
        limit = int(torch.cuda.get_per_process_memory_fraction(accelerator) * total)
        return min(free, max(0, limit - torch.cuda.memory_allocated(accelerator)))
    if accelerator != "cpu" or sys.platform != "linux":
        return free
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_DATA)
    return free if limit == resource.RLIM_INFINITY else min(free, max(0, limit - private_bytes()))


def describe_hardware(accelerator: str) -> str:
    """Describe the processor or accelerator in a few words."""
    if accelerator.startswith("cuda"):
        return torch.cuda.get_device_name(accelerator)
    return f"{processor_name()}, {torch.backends.cpu.get_cpu_capability()}, {count_text(torch.get_num_threads(), 'thread')}"


def end_if_device_is_lost(accelerator: str) -> None:
    """End this process if a GPU has refused what was computed, and so computes nothing more for it."""
    if accelerator.startswith("cuda"):
        try:
            torch.cuda.synchronize(accelerator)
        except RuntimeError as error:
            raise SystemExit(f"{accelerator} computes nothing more for this process: {error}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception means that memory could not be allocated."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in _OUT_OF_MEMORY)
