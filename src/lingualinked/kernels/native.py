"""Compiled kernels: where they lie, what the processor must support, and the threads that they share with torch.

Knows no kernel's arguments.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import struct
from collections.abc import Callable
from pathlib import Path

import torch

TEAM = "l3P"  # `struct team` of team.h, as the module `struct` writes it
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # as dtypes.h numbers them


@functools.cache
def load_library(name: str) -> ctypes.CDLL | None:
    """Return the library that was compiled from the source of this name as it is now, or None if there is none."""
    path = library_path(Path(__file__).with_name(f"{name}.c"))
    return ctypes.CDLL(str(path)) if path.exists() else None


def library_path(source: Path) -> Path:
    """Return where hatch_build.py puts what it compiles from a source: times mean nothing once a wheel is unpacked."""
    files = (source, *sorted(source.parent.glob("*.h")))
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    return source.with_name(f"lib{source.stem}-{digest[:12]}.so")


@functools.cache
def is_available(name: str, flags: frozenset[str]) -> bool:
    """Say whether a kernel was compiled, and the processor has the instruction sets that it needs."""
    return load_library(name) is not None and processor_flags() >= flags


def call(name: str, function: str, arguments: struct.Struct, *values: float) -> int:
    """Call a kernel's function with its structure, which ends with the threads that share its work; return what it returns."""
    return int(function_of(name, function)(arguments.pack(*values, *team())))


def call_alone(name: str, function: str, arguments: struct.Struct, *values: float) -> int:
    """Call a kernel's function with its structure, whose work one thread does; return what it returns."""
    return int(function_of(name, function)(arguments.pack(*values)))


def team() -> tuple[int, ...]:
    """Return the threads that share a kernel's work, as the end of its structure: as many as torch uses now."""
    num_threads = torch.get_num_threads()
    return (num_threads, *((num_threads > 1 and openmp()) or (0, 0, 0)))


@functools.cache
def function_address(name: str, function: str) -> int:
    """Return the address of a kernel's function."""
    return ctypes.cast(function_of(name, function), ctypes.c_void_p).value or 0  # type: ignore[arg-type]


@functools.cache
def function_of(name: str, function: str) -> Callable[[bytes], int]:
    """Return a kernel's function of its structure."""
    library = load_library(name)
    assert library is not None
    found: Callable[[bytes], int] = getattr(library, function)
    return found


@functools.cache
def processor_flags() -> frozenset[str]:
    """Return the instruction sets that the processor has and the system supports."""
    try:
        with Path("/proc/cpuinfo").open() as lines:
            return frozenset(next((line.split() for line in lines if line.startswith("flags")), []))
    except OSError:
        return frozenset()


@functools.cache
def openmp() -> tuple[int, ...]:
    """Return the entries of the OpenMP library that torch has loaded, whose threads kernels share; none without."""
    for path in {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "omp" in line}:
        library = ctypes.CDLL(path)
        names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
        if all(hasattr(library, name) for name in names):
            return tuple(ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0 for name in names)
    return ()
