"""Copying the KV of one session's layers to another worker while the session goes on: what is still to be sent, in pieces.

Knows KV layers and the message that tells where tokens belong; no sockets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lingualinked.errors import ProtocolError
from lingualinked.model.kv_cache import OwnedLayer, StageCache
from lingualinked.protocol.moving import KVSlice
from lingualinked.quantities import count_text


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """A row of tokens of one layer's KV.

    Parameters
    ----------
    place : KVSlice
        Which tokens of which layer.
    keys, values : Tensor
        [rows, heads, tokens, dim]; of what is to be sent views, valid until the KV cache changes.
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
    """How far a layer's KV has been sent: the position behind the last token, its rows, and how they were reordered since."""

    stop: int = 0
    num_rows: int = 0
    rows: Tensor | None = None


class KVCopy:
    """One session's KV in some layers, on its way to another worker.

    What has been sent stays of use whatever happens to the session meanwhile: new tokens are sent later, tokens that were
    taken back are sent anew, and of rows that are reordered only their order is told.

    Parameters
    ----------
    cache : StageCache
        The session's.
    slots : iterable of int
        Slots of the layers, which the stage owns.
    """

    def __init__(self, cache: StageCache, slots: Iterable[int]) -> None:
        self._layers: Mapping[int, OwnedLayer] = {slot: cache.owned[slot] for slot in sorted(slots)}
        self._sent = {slot: _Sent() for slot in self._layers}
        self.num_bytes = 0

    def reorder(self, rows: Tensor) -> None:
        """Take note that the session keeps the rows ``rows`` (int64 ``[new rows]``)."""
        for sent in self._sent.values():
            if len(rows) > sent.num_rows:  # more rows than there are is more than an order: all is sent anew
                sent.stop = 0
            sent.rows = rows if sent.rows is None else sent.rows.index_select(0, rows)

    def crop(self) -> None:
        """Take note that the session has taken tokens back."""
        for slot, layer in self._layers.items():
            self._sent[slot].stop = min(self._sent[slot].stop, layer.stop)

    def next_pieces(self, max_bytes: int) -> tuple[list[Piece], bool]:
        """Give what is to be sent next, of about so many bytes, and whether that is all.

        The last call gives a piece of every layer, with tokens or without: what the layer forgets is told with it.
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
        keys, values = layer.read(position, num_left)
        num_tokens = min(num_left, max(1, max_bytes * num_left // max(1, keys.nbytes + values.nbytes)))
        is_fresh = position == first  # nothing of what was sent before is kept, in whatever order
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
    """Add pieces to the KV cache of the session on the receiving side, in the order in which they were given.

    Raises
    ------
    ProtocolError
        If tokens between what is held and a piece are missing, or a piece is none of such a layer.
    """
    for piece in pieces:
        place = piece.place
        layer = cache.owned[place.slot]
        if place.first > place.position:
            raise ProtocolError(f"KV from token {place.position} on, of a layer that begins at {place.first}")
        if piece.keys.shape[:3] != piece.values.shape[:3] or piece.keys.dtype != piece.values.dtype:
            raise ProtocolError(
                f"keys {list(piece.keys.shape)} and values {list(piece.values.shape)} of different tokens"
            )
        if place.rows is not None:
            if not len(place.rows) == len(piece.keys) <= layer.num_rows:
                raise ProtocolError(
                    f"an order of {count_text(len(place.rows), 'row')} of KV, where {layer.num_rows} are held"
                )
            layer.reorder_cache(torch.tensor(place.rows, dtype=torch.long))
        layer.write(place.first, place.position, piece.keys, piece.values, place.capacity)
