"""Keeps what probes found for later processes, in a file for this processor and these libraries.

Knows no probe. A result that can't be read or written is found out again.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch
import transformers

from lingualinked.disk_cache import read_cached, write_cached
from lingualinked.kernels import native
from lingualinked.model.process.memory import limit_lifted
from lingualinked.model.process.torch_settings import read_torch_settings
from lingualinked.processor import describe_processor

_MAX_RESULTS = 10_000  # each length of a prompt is a product of its own
_VARIABLES = ("ATEN_", "DNNL_", "GLIBC_", "GOMP_", "KMP_", "LD_", "MKL_", "OMP_", "ONEDNN_")  # that choose functions

Probe = TypeVar("Probe", bound=Callable[..., Any])


def keep_result(kind: type) -> Callable[[Probe], Probe]:
    """Decorate a probe so that it runs only if no process before has found the result for the same arguments.

    Where it runs, it needs and keeps memory that no later process does (kernels made for each shape that is tried: up to 200 MB
    in bfloat16); a device's memory is that of its share of the model, so the limit does not count it. None, the result of a probe that failed, is not kept: it may have lacked memory.
    """

    def decorate(probe: Probe) -> Probe:
        @functools.wraps(probe)
        def kept(*arguments: object) -> Any:
            if not _can_keep():
                with limit_lifted():
                    return probe(*arguments)
            key = " ".join([probe.__name__, *map(str, arguments)])
            try:
                return msgspec.convert(_results()[key], kind)
            except (KeyError, msgspec.ValidationError):
                with limit_lifted():
                    result = probe(*arguments)
            if result is None:
                return None
            _results.cache_clear()  # other processes may have written meanwhile
            results = _results()
            results[key] = msgspec.to_builtins(result)
            if len(results) <= _MAX_RESULTS:
                write_cached(_file_name(), msgspec.json.encode(results).decode())
            return result

        return kept  # type: ignore[return-value]

    return decorate


def _can_keep() -> bool:
    """Say whether results hold for other processes, since torch has its default settings."""
    return not read_torch_settings()


@functools.cache
def _results() -> dict[str, Any]:
    try:
        return msgspec.json.decode(read_cached(_file_name()) or b"{}", type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError):
        return {}


@functools.cache
def _file_name() -> str:
    """Return a name that changes with what results depend on: processor, libraries, variables, probes and kernels."""
    digest = hashlib.sha256()
    variables = sorted(item for item in os.environ.items() if item[0].startswith(_VARIABLES))
    for each in (
        describe_processor(),
        platform.libc_ver(),
        torch.version.git_version,
        torch.__config__.show(),
        transformers.__version__,
        variables,
    ):
        digest.update(repr(each).encode())
    for path in sorted(file for module in (__file__, native.__file__) for file in Path(module).parent.glob("*")):
        if path.suffix in (".py", ".so"):
            digest.update(path.read_bytes())
    return f"probes-{digest.hexdigest()[:16]}.json"
