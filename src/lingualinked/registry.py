"""Lets records use functions of higher packages without importing them: tables, figures, data frames, explanations.

A higher package registers its functions here; `lingualinked` says where they are. Knows no record and no package.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from lingualinked.tables import Rows

_Result = TypeVar("_Result")


class Registry(Generic[_Result]):
    """A function of a record and further arguments, with one implementation per kind of record."""

    def __init__(self) -> None:
        self._function: Any = functools.singledispatch(self._load_and_call)
        self._load: Callable[[], object] = lambda: None

    def load_with(self, load: Callable[[], object]) -> None:
        """Set the function that imports the implementations; it is called for the first record without one."""
        self._load = load

    def register(self, kind: type, function: Callable[..., _Result]) -> None:
        """Add the implementation for a kind of record."""
        self._function.register(kind, function)

    def __call__(self, record: object, *arguments: Any) -> _Result:
        """Call the implementation for a record."""
        return self._function(record, *arguments)  # type: ignore[no-any-return]

    def _load_and_call(self, record: object, *arguments: Any) -> _Result:
        self._load()
        function = self._function.dispatch(type(record))
        assert function != self._load_and_call, f"nothing is registered for a {type(record).__name__}"
        return function(record, *arguments)  # type: ignore[no-any-return]


tables_of: Registry[Sequence[Rows]] = Registry()
figure_of: Registry[Any] = Registry()
frame_of: Registry[Any] = Registry()
explanation_of: Registry[Any] = Registry()
