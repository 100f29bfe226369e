"""The moves that the caller has announced: between which plan versions, and who holds what under each.

Knows names and spans; neither KV nor weights.
"""

from __future__ import annotations

from lingualinked.protocol.moving import AnnounceMove


class AnnouncedMoves:
    """What may leave and reach one worker while models move."""

    def __init__(self) -> None:
        self._moves: dict[int, AnnounceMove] = {}  # by number of the model

    def announce(self, move: AnnounceMove) -> None:
        """Let a model move, in the place of a move of it that was announced before."""
        self._moves[move.model] = move

    def forget(self, model: int) -> None:
        """Let nothing more of a model move."""
        self._moves.pop(model, None)

    def borrowers(self, model: int) -> tuple[str, ...]:
        """To whom weights of a model may be lent."""
        return self._moves[model].borrowers if model in self._moves else ()

    def spans(self, model: int, other_than: int) -> list[tuple[str, int, int]]:
        """Who holds which layers of a model, under the version of a move that is another than this one."""
        move = self._moves.get(model)
        if move is None:
            return []
        return [(each.name, each.start, each.end) for each in move.stages if each.plan_version != other_than]

    def spans_of(self, model: int, name: str) -> list[tuple[int, int]]:
        """Which layers of a model a party holds under either version of a move, or is to hold."""
        move = self._moves.get(model)
        return [] if move is None else [(each.start, each.end) for each in move.stages if each.name == name]
