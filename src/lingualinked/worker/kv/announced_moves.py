"""The moves that the caller has announced: which worker holds which layers under both plan versions of a move.

Knows names and spans; neither KV nor weights.
"""

from __future__ import annotations

from lingualinked.protocol.moving import AnnounceMove


class AnnouncedMoves:
    """The announced moves of one worker's models, at most one of each model."""

    def __init__(self) -> None:
        self._moves: dict[int, AnnounceMove] = {}  # by number of the model

    def announce(self, move: AnnounceMove) -> None:
        """Allow a model to move; this replaces an earlier announcement for the model."""
        self._moves[move.model] = move

    def drop_model(self, model: int) -> None:
        """End a model's announced move, if any."""
        self._moves.pop(model, None)

    def borrowers(self, model: int) -> tuple[str, ...]:
        """Return the workers to which weights of a model may be lent."""
        return self._moves[model].borrowers if model in self._moves else ()

    def spans_of_other_version(self, model: int, plan_version: int) -> list[tuple[str, int, int]]:
        """Return (name, start, end) of each holder of layers under the other plan version of a model's move."""
        move = self._moves.get(model)
        if move is None:
            return []
        return [(each.name, each.start, each.end) for each in move.stages if each.plan_version != plan_version]

    def spans_of_party(self, model: int, name: str) -> list[tuple[int, int]]:
        """Return the spans that a party holds under either plan version of a model's move."""
        move = self._moves.get(model)
        return [] if move is None else [(each.start, each.end) for each in move.stages if each.name == name]
