"""Copies the KV of one session's layers to another worker, in pieces, while the session continues.

Knows KV layers and the messages that place tokens and states; no sockets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor

from lingualinked.errors import ProtocolError
from lingualinked.model.kv.kv_cache import StageCache
from lingualinked.model.kv.layer_state import State
from lingualinked.model.kv.whole_layers import WholeLayer
from lingualinked.protocol.moving import MODULES, KVSlice, StateSlice
from lingualinked.quantities import count_text


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive tokens of one layer's KV; `place` says which.

    Keys and values are [rows, heads, tokens, dim]; on the sending side they are views, valid until the KV cache changes.
    """

    place: KVSlice
    keys: Tensor
    values: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self.keys.nbytes + self.values.nbytes


@dataclasses.dataclass(frozen=True, slots=True)
class StatePiece:
    """All that one layer keeps, if that is not full or sliding attention's KV, or that modules keep; `place` says which tensor is where."""

    place: StateSlice
    tensors: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(each.nbytes for each in self.tensors)


@dataclasses.dataclass(slots=True)
class _Sent:
    """What has been sent of a layer: the position after the last token, the rows, and how they were reordered since."""

    stop: int = 0
    num_rows: int = 0
    rows: Tensor | None = None


class KVCopy:
    """The copy of one session's KV, in the layers with these cache slots, to another worker, and of what modules keep.

    `is_kept` tells whether the value of a module's attribute belongs there, by its path.

    What has been sent stays valid while the session continues: new tokens are sent later, tokens after a crop are sent
    again, and of reordered rows only the order is sent. A state that each step changes is sent at the end, while the session
    waits.
    """

    def __init__(
        self, cache: StageCache, slots: Iterable[int], is_kept: Callable[[str], bool] = lambda _name: True
    ) -> None:
        self._modules, self._is_kept = cache.modules, is_kept
        self._states = cache.states(slots)
        whole = {slot for slot, _ in self._states}
        self._layers: dict[int, Any] = {
            slot: cache.owned[slot] for slot in sorted(slots) if slot in cache.owned and slot not in whole
        }
        self._sent = {slot: _Sent() for slot in self._layers}
        self._versions: dict[int, int] = {}  # of the states sent
        self.num_bytes = 0

    def record_reorder(self, rows: Tensor) -> None:
        """Record that the session keeps the rows ``rows`` (int64 ``[new rows]``)."""
        for sent in self._sent.values():
            if len(rows) > sent.num_rows:  # repeated rows can't be sent as an order: everything is sent again
                sent.stop = 0
            sent.rows = rows if sent.rows is None else sent.rows.index_select(0, rows)

    def record_crop(self) -> None:
        """Record that the session has removed tokens at its end."""
        for slot, layer in self._layers.items():
            self._sent[slot].stop = min(self._sent[slot].stop, layer.stop)

    def next_pieces(self, max_bytes: int, *, with_states: bool = True) -> tuple[list[Piece | StatePiece], bool]:
        """Return the next pieces to send, of about `max_bytes`, and whether they are the last ones; states only if asked for.

        The last call returns a piece of every layer, even an empty one, since it also says which tokens the layer dropped.
        """
        pieces: list[Piece | StatePiece] = []
        for slot, state in self._states if with_states else ():
            if state.version and self._versions.get(slot) != state.version:
                if max_bytes <= 0:
                    return pieces, False
                pieces.append(self._piece_of(slot, state.version, state.read_state()))
                max_bytes -= pieces[-1].nbytes
        if with_states and self._modules and self._versions.get(MODULES) != self._modules.version:
            if max_bytes <= 0:
                return pieces, False
            pieces.append(self._piece_of(MODULES, self._modules.version, self._modules.read_state(self._is_kept)))
            max_bytes -= pieces[-1].nbytes
        for slot, layer in self._layers.items():
            if max_bytes <= 0:
                return pieces, False
            if layer.is_initialized:
                pieces.append(self._next_piece(slot, layer, max_bytes))
                max_bytes -= pieces[-1].nbytes
                if self._sent[slot].stop < layer.stop:
                    return pieces, False
        return pieces, True

    def _piece_of(self, slot: int, version: int, state: State) -> StatePiece:
        places: dict[int, list[str]] = {}
        for name, value in state.items():
            if isinstance(value, Tensor):
                places.setdefault(id(value), []).append(name)
        plain = {name: value for name, value in state.items() if not isinstance(value, Tensor)}
        slice_ = StateSlice(slot=slot, version=version, tensors=tuple(map(tuple, places.values())), plain=plain)
        piece = StatePiece(slice_, tuple(cast("Tensor", state[first]) for first, *_ in places.values()))
        self._versions[slot] = version
        self.num_bytes += piece.nbytes
        return piece

    def _next_piece(self, slot: int, layer: Any, max_bytes: int) -> Piece:
        sent, first = self._sent[slot], layer.first
        position = max(sent.stop, first)
        num_left = layer.stop - position
        keys, values = layer.read_tokens(position, num_left)
        num_tokens = min(num_left, max(1, max_bytes * num_left // max(1, keys.nbytes + values.nbytes)))
        is_fresh = position == first  # nothing that was sent before is kept
        rows = None if sent.rows is None or is_fresh else tuple(sent.rows.tolist())
        piece = Piece(
            place=KVSlice(slot=slot, first=first, position=position, capacity=layer.capacity, rows=rows),
            keys=keys.narrow(2, 0, num_tokens),
            values=values.narrow(2, 0, num_tokens),
        )
        sent.stop, sent.num_rows, sent.rows = position + num_tokens, keys.shape[0], None
        self.num_bytes += piece.nbytes
        return piece


@torch.inference_mode()
def write_pieces(pieces: Iterable[Piece | StatePiece], cache: StageCache) -> None:
    """Add pieces to the receiver's KV cache, in the order in which they were sent.

    Raises ProtocolError if tokens before a piece are missing, or a piece does not fit its layer.
    """
    for piece in pieces:
        if isinstance(piece, StatePiece):
            _write_state(piece, cache)
            continue
        place = piece.place
        layer: Any = cache.owned[place.slot]
        if isinstance(layer, WholeLayer):
            raise ProtocolError(f"KV was sent for layer slot {place.slot}, whose state moves as a whole")
        if place.first > place.position:
            raise ProtocolError(
                f"KV from token {place.position} on was sent for a layer that begins at token {place.first}"
            )
        if piece.keys.shape[:3] != piece.values.shape[:3] or piece.keys.dtype != piece.values.dtype:
            raise ProtocolError(
                f"keys {list(piece.keys.shape)} and values {list(piece.values.shape)} belong to different tokens"
            )
        if place.rows is not None:
            if not len(place.rows) == len(piece.keys) <= layer.num_rows:
                raise ProtocolError(
                    f"an order of {count_text(len(place.rows), 'row')} of KV was sent, and {layer.num_rows} are held"
                )
            if not all(0 <= row < layer.num_rows for row in place.rows):  # a GPU does not survive such an index
                raise ProtocolError(f"an order of KV names rows that are not among {layer.num_rows}")
            layer.reorder_cache(torch.tensor(place.rows, dtype=torch.long))
        layer.write_tokens(place.first, place.position, piece.keys, piece.values, place.capacity)


def _write_state(piece: StatePiece, cache: StageCache) -> None:
    place = piece.place
    states: dict[int, Any] = {MODULES: cache.modules, **dict(cache.states([place.slot]))}
    if place.slot not in states:
        raise ProtocolError(f"a state was sent for layer slot {place.slot}, which keeps none that moves as a whole")
    if len(place.tensors) != len(piece.tensors):
        raise ProtocolError(
            f"a state of {count_text(len(place.tensors), 'tensor')} came with {count_text(len(piece.tensors), 'tensor')}"
        )
    named: State = {name: tensor for names, tensor in zip(place.tensors, piece.tensors, strict=True) for name in names}
    states[place.slot].write_state(named | place.plain, cache.device)
