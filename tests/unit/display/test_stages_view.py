"""What a step took in each stage is told from the steps that are remembered."""

from __future__ import annotations

from histories import recorded, step
from lingualinked.display.stages_view import stage_rows
from lingualinked.telemetry.history import History


def test_a_row_per_stage_of_every_plan() -> None:
    rows = stage_rows(recorded(200))
    assert [row[:2] for row in rows.rows] == [
        ("laptop", "[0, 8)"),
        ("phone", "[8, 16)"),
        ("nas", "[16, 24)"),
        ("laptop", "[0, 11)"),
        ("phone", "[11, 13)"),
        ("nas", "[13, 24)"),
    ]
    assert "of 3 devices busy" in rows.notes[-1]
    assert max(rows.bars) == 1.0


def test_medians_of_decode_steps_alone() -> None:
    history = History(steps=(step(number=0, tokens=16), step(number=1), step(number=2)))
    rows = stage_rows(history)
    assert rows.title == "Times of a decode step in each stage, median of 2"
    assert rows.rows[0][2:7] == ("1.0 ms", "2.0 ms", "10.0 ms", "500 µs", "4.0 KiB")


def test_prompts_alone_and_nothing_at_all() -> None:
    assert stage_rows(History(steps=(step(tokens=16),))).title == "Times of a step in each stage, median of 1"
    assert stage_rows(History()).rows == []
