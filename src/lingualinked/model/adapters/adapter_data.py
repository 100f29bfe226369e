"""What is said of adapters between processes: the modules that one changes, and which are active in a step. Plain data.

Knows neither torch nor peft, which the worker imports with the first adapter.
"""

from __future__ import annotations

import msgspec


class AdaptedModule(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One module that an adapter changes, by low-rank matrices.

    ``tensors`` are the names of its tensors below the module, such as "lora_A.weight", in the order in which they are sent.
    """

    path: str
    rank: int
    scaling: float
    use_dora: bool
    has_bias: bool  # whether the second matrix has one
    tensors: tuple[str, ...]


class Adapter(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """An adapter, or those of its modules that one stage holds; no two contents have the same number."""

    name: str
    number: int
    modules: tuple[AdaptedModule, ...]


class AdapterUse(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Which adapters a step computes with: those of ``names``, in this order; or those of ``rows``, one for each row.

    "__base__" stands for none in a row.
    """

    names: tuple[str, ...]
    rows: tuple[str, ...] | None = None
    is_disabled: bool = False
