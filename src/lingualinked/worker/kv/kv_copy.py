"""Copies the KV of one session's layers to another worker, in pieces, while the session continues.

Knows KV layers and the message that places tokens; no sockets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lingualinked.errors import ProtocolError
from lingualinked.model.kv.kv_cache import OwnedLayer, StageCache
from lingualinked.protocol.moving import KVSlice
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


@dataclasses.dataclass(slots=True)
class _Sent:
    """What has been sent of a layer: the position after the last token, the rows, and how they were reordered since."""

    stop: int = 0
    num_rows: int = 0
    rows: Tensor | None = None


class KVCopy:
    """The copy of one session's KV, in the layers with these cache slots, to another worker.

    What has been sent stays valid while the session continues: new tokens are sent later, tokens after a crop are sent
    again, and of reordered rows only the order is sent.
    """

    def __init__(self, cache: StageCache, slots: Iterable[int]) -> None:
        self._layers: Mapping[int, OwnedLayer] = {slot: cache.owned[slot] for slot in sorted(slots)}
        self._sent = {slot: _Sent() for slot in self._layers}
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

    def next_pieces(self, max_bytes: int) -> tuple[list[Piece], bool]:
        """Return the next pieces to send, of about `max_bytes`, and whether they are the last ones.

        The last call returns a piece of every layer, even an empty one, since it also says which tokens the layer dropped.
        """
        pieces: list[Piece] = []
        for slot, layer in self._layers.items():
            if max_bytes <= 0:
                return pieces, False
            if layer.is_initialized:
                pieces.append(self._next_piece(slot, layer, max_bytes))
                max_bytes -= pieces[-1].nbytes
                if self._sent[slot].stop < layer.stop:
                    return pieces, False
        return pieces, True

    def _next_piece(self, slot: int, layer: OwnedLayer, max_bytes: int) -> Piece:
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
def write_pieces(pieces: Iterable[Piece], cache: StageCache) -> None:
    """Add pieces to the receiver's KV cache, in the order in which they were sent.

    Raises ProtocolError if tokens before a piece are missing, or a piece does not fit its layer.
    """
    for piece in pieces:
        place = piece.place
        layer = cache.owned[place.slot]
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
