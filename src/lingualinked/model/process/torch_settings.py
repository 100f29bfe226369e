"""The settings of torch that determine the kernels and dtypes of a forward pass: read in one process, applied in another.

Knows torch only; no models and no steps.
"""

from __future__ import annotations

import contextlib
import operator
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import backends, nn

TorchSettings = Mapping[str, bool | int | str]
"""Values by name, of the settings that differ from torch's defaults."""


class _Setting(NamedTuple):
    default: bool | int | str
    read: Callable[[], bool | int | str]
    write: Callable[[Any], object]


def _attribute(default: bool | int | str, owner: Any, name: str) -> _Setting:
    return _Setting(default, lambda: getattr(owner, name), lambda value: setattr(owner, name, value))


def _autocast(device_type: str) -> _Setting:
    def read() -> str:
        return _dtype_name(torch.get_autocast_dtype(device_type)) if torch.is_autocast_enabled(device_type) else ""

    def write(name: str) -> None:
        if name:
            torch.set_autocast_dtype(device_type, _dtype(name))
        torch.set_autocast_enabled(device_type, bool(name))

    return _Setting("", read, write)


def _sdp(name: str) -> _Setting:
    return _Setting(True, getattr(backends.cuda, f"{name}_sdp_enabled"), getattr(backends.cuda, f"enable_{name}_sdp"))


def _matmul_precision() -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # set by its newer names, which are read below
        return "highest"


def flushes_denormals() -> bool:
    """Return whether this thread takes numbers below the smallest normal one for zero."""
    smallest_normal = sys.float_info.min
    return bool(operator.truediv(smallest_normal, 2) == 0.0)  # computed at run time, in the mode of this thread


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is not a dtype of torch")
    return dtype


# They are applied and restored in this order: the first precision of float32 sets the others too.
_SETTINGS: dict[str, _Setting] = {
    "autocast.cpu": _autocast("cpu"),
    "autocast.cuda": _autocast("cuda"),
    "autocast.mps": _autocast("mps"),
    "default_dtype": _Setting(
        "float32", lambda: _dtype_name(torch.get_default_dtype()), lambda name: torch.set_default_dtype(_dtype(name))
    ),
    "deterministic": _Setting(0, torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    "flush_denormal": _Setting(False, flushes_denormals, torch.set_flush_denormal),
    "sdp.flash": _sdp("flash"),
    "sdp.mem_efficient": _sdp("mem_efficient"),
    "sdp.math": _sdp("math"),
    "sdp.cudnn": _sdp("cudnn"),
    "sdp.reduced": _Setting(
        False, backends.cuda.fp16_bf16_reduction_math_sdp_allowed, backends.cuda.allow_fp16_bf16_reduction_math_sdp
    ),
    "float32.matmul": _Setting("highest", _matmul_precision, torch.set_float32_matmul_precision),
    "float32": _attribute("none", backends, "fp32_precision"),
    "float32.mkldnn": _attribute("none", backends.mkldnn, "fp32_precision"),
    "float32.mkldnn.matmul": _attribute("none", backends.mkldnn.matmul, "fp32_precision"),  # type: ignore[attr-defined]
    "float32.cuda.matmul": _attribute("none", backends.cuda.matmul, "fp32_precision"),
    "cuda.matmul.float16": _attribute(True, backends.cuda.matmul, "allow_fp16_reduced_precision_reduction"),
    "cuda.matmul.bfloat16": _attribute(True, backends.cuda.matmul, "allow_bf16_reduced_precision_reduction"),
    "cuda.matmul.accumulation": _attribute(False, backends.cuda.matmul, "allow_fp16_accumulation"),
    "mkldnn": _Setting(True, torch._C._get_mkldnn_enabled, torch._C._set_mkldnn_enabled),  # noqa: SLF001 - no public setter
    "mkldnn.deterministic": _attribute(False, backends.mkldnn, "deterministic"),
}


def read_torch_settings() -> dict[str, bool | int | str]:
    """Return the settings of this thread that differ from torch's defaults."""
    values = {name: setting.read() for name, setting in _SETTINGS.items()}
    return {name: value for name, value in values.items() if value != _SETTINGS[name].default}


@contextlib.contextmanager
def torch_settings(settings: TorchSettings) -> Iterator[None]:
    """Apply settings within the context; settings that are not given are left at torch's defaults.

    Raises ValueError if one is unknown or not available on this machine.
    """
    unknown = settings.keys() - _SETTINGS.keys()
    if unknown:
        raise ValueError(f"{min(unknown)!r} is not a known setting of torch")
    before = {name: setting.read() for name, setting in _SETTINGS.items()} if settings else {}
    try:
        for name in [name for name in _SETTINGS if name in settings]:
            _SETTINGS[name].write(settings[name])
            if _SETTINGS[name].read() != settings[name]:
                raise ValueError(f"torch can't set {name!r} to {settings[name]!r} here")
        yield
    finally:
        for name, value in before.items():
            if _SETTINGS[name].read() != value:
                _SETTINGS[name].write(value)
        if before:
            torch.clear_autocast_cache()


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Make no weight of a model require gradients within the context.

    Only there: whether a weight does determines how torch multiplies strided inputs, even where no gradients are computed.
    """
    learning = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in learning:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in learning:
            weight.requires_grad_(True)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute with one thread within the context."""
    before = torch.get_num_threads()
    if before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
