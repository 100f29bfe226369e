"""A decoder layer's step of one new token per row as one call of kernels, each of which has torch's bits.

Knows the order of a layer's parts and the kernels' structures; not whether a layer computes so: who calls compares.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lingualinked.kernels import attention, few_rows, gated, native, norm, rotary
from lingualinked.kernels.sequence import Call, KernelSequence
from lingualinked.model.exact import exact_attention, exact_rotary
from lingualinked.model.exact.exact_gate import FasterGate, find_table, multiplies_as_torch
from lingualinked.model.exact.exact_norm import FasterNorm, kernel_of
from lingualinked.model.exact.layer_trace import Attention, LayerTrace
from lingualinked.model.exact.packed_linear import PackedLinear, few_rows_chunk
from lingualinked.model.hf_internals.computing import rotation_of

MAX_ROWS = 16

_ALIGNMENT = 64
_BYTES = 2  # of a number
_DTYPE = torch.bfloat16  # of packed weights
_PARTS = {"nllllng": False, "nlnlnllng": True}  # norms, linear layers and gates; whether queries and keys have norms


class LayerParts(NamedTuple):
    """The parts of a layer in the order in which it calls them."""

    norm: FasterNorm
    query: PackedLinear
    query_norm: FasterNorm | None
    key: PackedLinear
    key_norm: FasterNorm | None
    value: PackedLinear
    output: PackedLinear
    second_norm: FasterNorm
    gated: FasterGate

    @classmethod
    def of(cls, trace: LayerTrace) -> LayerParts | None:
        """Return the parts that a layer has called; None if it has called, or computed, anything else."""
        kinds = "".join(_kind(each) for each in trace.modules)
        found: list[Any] = list(trace.modules)
        if kinds not in _PARTS:
            return None
        if not _PARTS[kinds]:
            found = [*found[:2], None, found[2], None, *found[3:]]
        # Beside its parts: keys and values are copied, and what goes round attention, and round the rest, is added.
        is_known = [each for each in trace.operations if each != "copy_"] == ["add", "add"]
        return cls(*found) if is_known else None

    def all_linears(self) -> list[PackedLinear] | None:
        """Return the linear layers of the layer, of which the last three belong to the gates; None if they are others."""
        gated = [self.gated.get_submodule(name) for name in self.gated.gated_parts[:3]]
        found = [each for each in (*self, *gated) if isinstance(each, PackedLinear)]
        return found if isinstance(gated[0], PackedLinear) and len(found) == 7 else None


def _kind(module: nn.Module) -> str:
    return (
        "n"
        if isinstance(module, FasterNorm)
        else "l"
        if isinstance(module, PackedLinear)
        else "g"
        if isinstance(module, FasterGate)
        else "?"
    )


class LayerProgram:
    """The kernels of a layer, for a number of rows; texts are described in the memory that begins with their descriptions."""

    def __init__(self, linears: list[PackedLinear], norms: list[FasterNorm], calls: list[Call], memory: Tensor) -> None:
        self._sequence, self._memory = KernelSequence(calls), memory
        self._texts = memory.data_ptr()
        self._linears = linears
        named = [(each, "weight") for each in norms] + [(each, "bias") for each in linears if each.has_bias]
        self._parameters = [(vars(each)["_parameters"], name) for each, name in named]
        self._addresses = self._find_addresses()
        place, names = self._sequence.place, [each.function for each in calls]
        self._inputs = place(0, 0), place(names.index("add"), 0)
        self._angles = place(names.index("rotary"), 10)
        self._result = place(len(calls) - 1, 2)

    def is_current(self) -> bool:
        """Say whether weights and biases lie where they lay."""
        return self._find_addresses() == self._addresses

    def _find_addresses(self) -> list[int]:
        own = [parameters[name].data_ptr() for parameters, name in self._parameters]
        return [*own, *(each.address for each in self._linears)]

    def run(self, states: Tensor, cosines: Tensor, sines: Tensor, texts: bytes) -> Tensor | None:
        """Compute the layer, and write new keys and values to texts; return None if a result is not finite."""
        result = torch.empty_like(states)
        write, address = self._sequence.write, states.data_ptr()
        for each in self._inputs:
            write(each, address)
        write(self._angles, cosines.data_ptr(), sines.data_ptr())
        write(self._result, result.data_ptr())
        ctypes.memmove(self._texts, texts, len(texts))
        return result if self._sequence.run() else None


def build_program(parts: LayerParts, attended: Attention, angles: Sequence[int], num_rows: int) -> LayerProgram | None:
    """Return the kernels of a layer, which has called attention so; None unless each has the bits of what it stands for.

    ``angles`` are the sizes of cosines and of sines.
    """
    _, num_heads, _, dim = attended.query.shape
    num_key_heads = attended.keys.shape[1]
    shapes = (num_rows, num_heads, 1, dim), (num_rows, num_key_heads, 1, dim), angles
    linears = parts.all_linears()
    if linears is None:
        return None
    gate, other, last = linears[-3:]
    hidden, inner = gate.in_features, gate.out_features
    table = find_table(parts.gated.get_submodule(parts.gated.gated_parts.activation), _DTYPE, inner)
    if (
        table is None
        or not multiplies_as_torch(_DTYPE)
        or not exact_rotary.uses_kernel(rotation_of(attended.module), _DTYPE, *shapes)
        or attended.mask is not None
        or exact_attention.has_unknown(attended.arguments)
        or not exact_attention.uses_kernel(attended.module, attended.query, attended.keys, attended.values, None)
    ):
        return None
    # 1) results lie one after the other, behind the descriptions of texts
    query, key = num_heads * dim, num_key_heads * dim
    rows = {"texts": attention.TEXT_BYTES, **{name: _BYTES * size for name, size in (
        ("normed", hidden), ("query", query), ("key", key), ("value", key), ("queries", query), ("keys", key),
        ("rotated", query), ("turned", key), ("attended", query), ("output", hidden), ("sum", hidden), ("gate", inner),
        ("other", inner), ("product", inner), ("last", hidden),
    )}}  # fmt: skip
    places, end = {}, 0
    for name, num_bytes in rows.items():
        places[name] = end
        end += -(-num_rows * num_bytes // _ALIGNMENT) * _ALIGNMENT
    memory = torch.empty(end, dtype=torch.uint8)
    at = {name: memory.data_ptr() + place for name, place in places.items()}
    # 2) the calls
    scale = attended.arguments.get("scaling")
    heads = (at["queries" if parts.query_norm else "query"], at["rotated"], num_heads), (
        at["keys" if parts.key_norm else "key"], at["turned"], num_key_heads,
    )  # fmt: skip
    states = [at[name] for name in ("rotated", "turned", "value", "attended")]
    count, gates = num_rows * hidden, [at[name] for name in ("gate", "other")]
    number = native.DTYPES[_DTYPE]
    calls = [
        _normalise(parts.norm, 0, at["normed"], num_rows),
        _multiply(parts.query, at["normed"], at["query"], num_rows),
        _multiply(parts.key, at["normed"], at["key"], num_rows),
        _multiply(parts.value, at["normed"], at["value"], num_rows),
        *(
            [] if parts.query_norm is None or parts.key_norm is None else [
                _normalise(parts.query_norm, at["query"], at["queries"], num_rows * num_heads),
                _normalise(parts.key_norm, at["key"], at["keys"], num_rows * num_key_heads),
            ]
        ),
        Call("rotary", "rotary", rotary.pack(heads, 0, 0, angles[0], num_rows, dim, _DTYPE), returns=True),
        Call("attention", "attention", attention.pack_texts(
            states, at["texts"], num_rows, (num_heads, num_key_heads), dim, _DTYPE, dim**-0.5 if scale is None else scale
        ), returns=False),
        _multiply(parts.output, at["attended"], at["output"], num_rows),
        Call("gated", "add", gated.SUM.pack(0, at["output"], at["sum"], count, number), returns=True),
        _normalise(parts.second_norm, at["sum"], at["normed"], num_rows),
        _multiply(gate, at["normed"], at["gate"], num_rows),
        _multiply(other, at["normed"], at["other"], num_rows),
        Call("gated", "gate", gated.GATED.pack(
            *gates, table.data_ptr(), at["product"], num_rows * inner, number, 0, *native.team()
        ), returns=True),
        _multiply(last, at["product"], at["last"], num_rows),
        Call("gated", "add", gated.SUM.pack(at["sum"], at["last"], 0, count, number), returns=True),
    ]  # fmt: skip
    known = [each for each in calls if each is not None]
    norms = [each for each in parts if isinstance(each, FasterNorm)]
    return LayerProgram(linears, norms, known, memory) if len(known) == len(calls) else None


def _multiply(layer: PackedLinear, rows: int, result: int, num_rows: int) -> Call | None:
    chunk = few_rows_chunk(layer, num_rows)
    if chunk is None:
        return None
    bias = layer.bias.data_ptr() if layer.has_bias else 0
    sizes = num_rows, layer.in_features, layer.out_features, chunk
    return Call("few_rows", "multiply", few_rows.pack(rows, layer.address, bias, result, *sizes), returns=False)


def _normalise(layer: FasterNorm, states: int, result: int, num_rows: int) -> Call | None:
    known = kernel_of(layer, num_rows)
    if known is None:
        return None
    weight, kind, epsilon = known
    structure = norm.pack(states, weight.data_ptr(), result, num_rows, weight.numel(), weight.dtype, kind, epsilon)
    return Call("norm", "norm", structure, returns=True)
