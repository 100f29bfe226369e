"""What is measured: values of several sides, taken in turns; a report of them as a table and as JSON.

Knows numbers and names; measures nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import msgspec

from lingualinked.cli.bench.machine import Machine
from lingualinked.cli.repeats import Repeats, ratios
from lingualinked.tables import Rows

Unit = Literal["tokens/s", "s", "ms", "µs", "MiB", "bytes"]

_NUM_DIGITS = {"tokens/s": 1, "s": 2, "ms": 1, "µs": 0, "MiB": 1, "bytes": 0}


class Measurement(msgspec.Struct, frozen=True, kw_only=True):
    """Values of one thing that several sides do, in the order of the rounds; the first side is the one compared with the others."""

    what: str
    unit: Unit
    values: dict[str, list[float]]
    predicted: float | None = None  # of the first side, by its plan
    at_least: dict[str, float] = {}  # how many times as good as which side it should be
    at_most: float | None = None  # what the first side's value should not exceed
    notes: tuple[str, ...] = ()
    load_average: float = 0.0  # of the machine, of the last minute, when the rounds began

    def gain(self, other: str) -> Repeats:
        """Return how many times as fast (or as small) the first side is, round by round."""
        ours, theirs = Repeats(self.values[self.side]), Repeats(self.values[other])
        return ratios(ours, theirs) if self.unit == "tokens/s" else ratios(theirs, ours)

    @property
    def side(self) -> str:
        """The side that is compared with the others."""
        return next(iter(self.values))

    def rows(self) -> list[tuple[str, ...]]:
        """Return a row for each side: its values, and how many times as good the first side is."""
        digits = _NUM_DIGITS[self.unit]
        rows: list[tuple[str, ...]] = []
        for name, values in self.values.items():
            is_first = name == self.side
            wanted = self.at_most if is_first else self.at_least.get(name)
            limit = "" if wanted is None else f"at most {wanted:g}" if is_first else f"{wanted:g}"
            rows.append(
                (
                    f"{self.what}: {name}" if is_first else f"  {name}",
                    Repeats(values).text(digits, f" {self.unit}"),
                    "" if is_first else self.gain(name).text(2),
                    limit,
                    f"{self.predicted:.{digits}f} {self.unit}" if is_first and self.predicted is not None else "",
                )
            )
        return rows


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What one command has measured, and on which machine."""

    command: str
    machine: Machine
    measurements: tuple[Measurement, ...]

    def to_json(self) -> str:
        """Return the report as JSON, indented, values rounded to five significant digits."""
        plain = msgspec.to_builtins(self)
        for measurement in plain["measurements"]:
            measurement["values"] = {
                name: [float(f"{value:.5g}") for value in values] for name, values in measurement["values"].items()
            }
        return msgspec.json.format(msgspec.json.encode(plain), indent=1).decode() + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Report:
        """Read a report that `to_json` wrote."""
        return msgspec.json.decode(text, type=cls)

    def to_rows(self) -> Rows:
        """Return the report as a table."""
        rows = [row for measurement in self.measurements for row in measurement.rows()]
        return Rows(
            self.command,
            COLUMNS,
            rows,
            notes=[
                "Medians, in brackets the lowest and the highest round; times as fast: round by round.",
                *dict.fromkeys(note for measurement in self.measurements for note in measurement.notes),
                self.machine.text(),
            ],
        )


COLUMNS = ("what", "measured", "times as fast", "wanted", "predicted")


def take_turns(sides: Mapping[str, Callable[[], float]], repeats: int, *, num_warm: int = 1) -> dict[str, list[float]]:
    """Measure each side once a round, in one order and in the other; rounds that warm up do not count.

    A machine's speed drifts, and what is measured in one round drifts together.
    """
    values: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(num_warm + repeats):
        for name in reversed(list(sides)) if number % 2 else list(sides):
            value = sides[name]()
            if number >= num_warm:
                values[name].append(value)
    return values
