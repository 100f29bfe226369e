"""Finds out what the modules of a model are called with, and return, by passes without data.

Knows shapes, on the meta device; neither weights nor workers.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import functools
import threading
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch

from lingualinked.errors import ArgumentError
from lingualinked.model.cutting.heads import HeadPass, find_head
from lingualinked.model.cutting.parts import build_meta
from lingualinked.model.cutting.trace import NoData
from lingualinked.model.hooks.hook_cuts import first_tensor
from lingualinked.model.hooks.instrument_data import Side
from lingualinked.model.spec import ModelSpec

Dimension = int | Literal["rows", "tokens"] | None
"""A size that is the same in each step, or the step's; None: another one."""

_finding = threading.Lock()  # threads that ask at once need one answer

_PASSES = (
    (2, 13, 5),
    (3, 19, 7),
)  # rows, tokens, logits to keep: a size in one that is another in the other is the step's


@dataclasses.dataclass(frozen=True, slots=True)
class ModuleCall:
    """What a module is called with, or returns, in a step: its first tensor there."""

    num_calls: int  # 0: it is not called
    dimensions: tuple[Dimension, ...] | None  # None: its calls differ
    is_floating_point: bool

    @property
    def has_tokens(self) -> bool:
        """Whether its first two dimensions are rows and tokens."""
        return self.dimensions is not None and self.dimensions[:2] == ("rows", "tokens")


ModuleCalls = Mapping[tuple[str, Side], ModuleCall]


def find_calls(spec: ModelSpec, *, takes_embeddings: bool = False) -> ModuleCalls:
    """Return what is known of each module's input and output, in steps with ids or with embeddings; it is found out once."""
    with _finding:
        return _find_calls(spec, takes_embeddings)


@functools.lru_cache(maxsize=8)
def _find_calls(spec: ModelSpec, takes_embeddings: bool) -> ModuleCalls:
    # Building sets torch's default dtype, of all threads: here it stays as it is. Some kernels can't run float32 on the meta device.
    default = str(torch.get_default_dtype()).removeprefix("torch.")
    meta: Any = build_meta(dataclasses.replace(spec, dtype=default))
    meta.to(torch.bfloat16)
    seen = [_run_pass(meta, *sizes, takes_embeddings=takes_embeddings) for sizes in _PASSES]
    return {
        key: _join(*(each.get(key, []) for each in seen)) for key in dict.fromkeys(key for each in seen for key in each)
    }


def match_modules(patterns: Iterable[Any], side: Side, calls: ModuleCalls, paths: Mapping[str, str]) -> list[str]:
    """Return the paths of the modules that patterns mean, in the order of the model; raise ArgumentError if one means none.

    `paths` are those of all modules, with those by which stages know them.
    """
    found: set[str] = set()
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise ArgumentError(f"{pattern!r} is not the path of a submodule, such as 'model.layers.3.mlp'")
        names = pattern.split(".")
        matching = [path for path in paths if _matches(path.split("."), names)]
        called = [path for path in matching if (paths[path], side) in calls]
        if not matching:
            near = difflib.get_close_matches(pattern, paths, 5, 0.5)
            raise ArgumentError(
                f"{pattern!r} matches no submodule of a stage: "
                + (f"did you mean {' or '.join(map(repr, near))}?" if near else "see model.named_modules()")
            )
        if not called:
            raise ArgumentError(
                f"{pattern!r} matches {' and '.join(matching[:3])}, which a forward pass never calls with a tensor: "
                "name what is in it, such as 'model.layers.*'"
            )
        found.update(called)
    return [path for path in paths if path in found]


def _matches(names: list[str], patterns: list[str]) -> bool:
    return len(names) == len(patterns) and all(map(fnmatch.fnmatchcase, names, patterns))


def _run_pass(
    meta: Any, num_rows: int, num_tokens: int, num_kept: int, *, takes_embeddings: bool
) -> dict[tuple[str, Side], list[torch.Tensor]]:
    """Run the model without data; return the first tensors that each module is called with, and returns."""
    seen: dict[tuple[str, Side], list[torch.Tensor]] = {}

    def record(path: str, side: Side, value: Any) -> None:
        try:
            seen.setdefault((path, side), []).append(first_tensor(f"the {side} of {path}", value))
        except ArgumentError:
            seen.pop((path, side))

    def watch(path: str, module: torch.nn.Module) -> None:
        module.register_forward_pre_hook(
            lambda _, args, kwargs: record(path, "input", (*args, *kwargs.values())), with_kwargs=True
        )
        module.register_forward_hook(lambda _module, _args, output: record(path, "output", output))

    for path, module in meta.named_modules():
        if path:
            module._forward_hooks.clear()  # noqa: SLF001 - those of the pass before
            module._forward_pre_hooks.clear()  # noqa: SLF001
            watch(path, module)
    ids = torch.zeros((num_rows, num_tokens), dtype=torch.int64, device="meta")
    with torch.no_grad(), NoData():
        inputs = {"input_ids": ids}
        if takes_embeddings:
            inputs = {"inputs_embeds": meta.get_input_embeddings()(ids)}
            seen.clear()
        HeadPass(meta, find_head(meta)).run(is_last=True, **inputs, use_cache=False, logits_to_keep=num_kept)
    return seen


def _join(one: list[torch.Tensor], other: list[torch.Tensor]) -> ModuleCall:
    """Compare a module's tensors in two passes."""
    sizes = [tuple(tensor.shape for tensor in each) for each in (one, other)]
    is_floating_point = all(tensor.is_floating_point() for tensor in (*one, *other))
    if not all(len(set(each)) == 1 for each in sizes) or len(sizes[0][0]) != len(sizes[1][0]):
        return ModuleCall(max(len(one), len(other)), None, is_floating_point)
    dimensions = tuple(map(_dimension, sizes[0][0], sizes[1][0]))
    return ModuleCall(len(one) if len(one) == len(other) else 0, dimensions, is_floating_point)


def _dimension(one: int, other: int) -> Dimension:
    for name, sizes in zip(("rows", "tokens"), zip(*_PASSES, strict=True), strict=False):
        if (one, other) == sizes:
            return name  # type: ignore[return-value]
    return one if one == other > 1 else None  # a step may have more rows where these passes have one
