"""Makes the classes of sharded models and of their submodules: each equals the class that it stands for.

Knows classes only; nothing of models.
"""

from __future__ import annotations

from typing import Any


class StandInClass(type):
    """Class of the classes that stand for another, so that tables by class, and ``type(module) == nn.Linear``, find it."""

    def __eq__(cls, other: object) -> bool:
        return isinstance(other, type) and _meant(cls) is _meant(other)

    def __hash__(cls) -> int:
        return type.__hash__(_meant(cls))


def _meant(given: type) -> type:
    """Return the class that a class stands for itself, or the class."""
    meant: type = vars(given).get("_stands_for", given)
    return meant


def make_stand_in(real: Any, bases: tuple[Any, ...], namespace: dict[str, Any]) -> Any:
    """Make a subclass of ``bases``, with the name of ``real``, that stands for it."""
    own = {"__module__": real.__module__, "__doc__": real.__doc__}
    if type(real) is not type:  # a class of classes of its own
        return type(real.__name__, bases, own | namespace)
    return StandInClass(real.__name__, bases, own | namespace | {"_stands_for": real})
