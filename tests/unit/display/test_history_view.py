"""What a pipeline went through is drawn over time, and its decisions and migrations told in words."""

from __future__ import annotations

import dataclasses
import io
import sys

import pytest

import lingualinked as ll
from histories import START_S, decision, migration, recorded
from lingualinked.display.decisions_view import decision_rows, migration_rows
from lingualinked.display.figure import _figure_class, new_figure
from lingualinked.telemetry.decisions import moves_text
from lingualinked.telemetry.history import History
from lingualinked.telemetry.recorder import Recorder


@pytest.fixture(scope="module", autouse=True)
def fonts() -> None:
    """Open the fonts, which matplotlib keeps open for the rest of the process."""
    figure = new_figure(1, 1)
    figure.text(0, 0, "text")
    figure.savefig(io.BytesIO())


def telemetry(history: History) -> ll.Telemetry:
    return ll.Telemetry(stages=(), workers=(), history=history)


@pytest.mark.parametrize("num_steps", [1, 12, 800])
def test_a_history_is_plotted(num_steps: int) -> None:
    history = recorded(num_steps)
    figure = telemetry(history).plot()
    compute, busy, rate = figure.axes
    assert [line.get_label() for line in compute.lines[:3]] == ["laptop", "phone", "nas"]
    assert [label.get_text() for label in busy.get_yticklabels()] == ["laptop", "phone", "nas"]
    assert rate.get_ylabel() == "tokens/s"
    assert compute.get_xlim()[1] >= history.end_s - START_S
    assert figure._repr_png_().startswith(b"\x89PNG")  # type: ignore[attr-defined]


def test_of_many_steps_the_medians_are_plotted() -> None:
    compute = telemetry(recorded(4000)).plot().axes[0]
    phone = compute.lines[1]
    assert len(phone.get_xdata()) <= 120
    assert max(phone.get_ydata()) == pytest.approx(38.4, rel=0.1)  # 8 layers, four times slower
    assert phone.get_ydata()[0] == pytest.approx(9.6, rel=0.1)


def test_a_step_out_of_line_does_not_flatten_the_others() -> None:
    recorder = Recorder(start_s=START_S)
    for index, each in enumerate(recorded(150).steps):
        slow = tuple(dataclasses.replace(stage, compute_s=30.0) for stage in each.stages)
        recorder.add_step(dataclasses.replace(each, stages=slow) if index == 75 else each)
    assert telemetry(recorder.history()).plot().axes[0].get_ylim()[1] < 500


def test_prompts_alone_are_plotted() -> None:
    history = recorded(2)
    compute, _, rate = telemetry(history).plot().axes
    assert compute.get_title(loc="left") == "compute of a prefill step"
    assert rate.get_title(loc="left") == "prompt tokens of all sessions"
    assert rate.get_ylim()[1] > 1


def test_migrations_are_marked_with_what_they_moved() -> None:
    history = recorded(800)
    failed = migration(START_S + 3, error="no memory")
    figure = telemetry(dataclasses.replace(history, migrations=(failed, *history.migrations))).plot()
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == [f"failed: {moves_text(failed.moves)}", "[8, 11) phone → laptop, [13, 16) phone → nas"]
    for axes in figure.axes:
        assert sum(line.get_linestyle() == "--" for line in axes.lines) == 2


def test_many_migrations_are_marked_without_words() -> None:
    history = recorded(800)
    many = tuple(migration(START_S + 1 + index) for index in range(12))
    compute = telemetry(dataclasses.replace(history, migrations=many)).plot().axes[0]
    assert sum(line.get_linestyle() == "--" for line in compute.lines) == 12
    assert not compute.texts


def test_the_last_seconds_are_plotted() -> None:
    history = recorded(800)
    left_s, right_s = telemetry(history).plot(last_s=5.0).axes[0].get_xlim()
    assert (left_s, right_s) == pytest.approx((history.end_s - START_S - 5, history.end_s - START_S))


def test_a_migration_that_outlasts_the_last_step_is_in_the_picture() -> None:
    history = recorded(50)
    late = dataclasses.replace(migration(history.end_s - 0.1), load_s=60.0)
    left_s, right_s = telemetry(dataclasses.replace(history, migrations=(late,))).plot(last_s=1.0).axes[0].get_xlim()
    assert left_s == pytest.approx(history.end_s - START_S - 1)
    assert right_s > 60


@pytest.mark.parametrize("last_s", [0, -1.0, float("nan")])
def test_no_seconds_are_refused(last_s: float) -> None:
    with pytest.raises(ll.ArgumentError, match="last_s"):
        telemetry(recorded(5)).plot(last_s=last_s)


def test_a_step_that_took_no_time_is_plotted() -> None:
    sample = dataclasses.replace(recorded(1).steps[0], total_s=0.0)
    figure = telemetry(History(start_s=START_S, steps=(sample,))).plot()
    assert figure._repr_png_()  # type: ignore[attr-defined]


def test_a_step_through_no_stage_is_plotted() -> None:
    sample = dataclasses.replace(recorded(1).steps[0], stages=())
    assert telemetry(History(start_s=START_S, steps=(sample,))).plot()._repr_png_()  # type: ignore[attr-defined]


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    _figure_class.cache_clear()
    try:
        with pytest.raises(ll.ArgumentError, match=r"lingualinked\[plot\]"):
            telemetry(recorded(5)).plot()
    finally:
        _figure_class.cache_clear()


def test_telemetry_tells_what_was_decided_and_moved_last() -> None:
    live = telemetry(recorded(800))
    text, html = " ".join(str(live).split()), live._repr_html_()
    for part in ("tokens/s; busy: laptop", "decided at 19.33 s: stay: a step would", "moved [8, 11) phone → laptop"):
        assert part in text
        assert part in html
    assert text.count("decided at") == 3


def test_decisions_are_told_in_a_table() -> None:
    rows = decision_rows([decision(START_S + 2), decision(START_S + 3, "move")], START_S)
    text = rows.to_text()
    for part in ("2.00 s", "stay", "98.0 ms", "41.0 ms", "17.10 s", "1.40 s", "30.00 s", "240 MiB"):
        assert part in text
    assert rows.notes[0].startswith("at 2.00 s: stay: a step would take")
    assert rows.notes[1].startswith("at 3.00 s: move [8, 11) phone → laptop, [13, 16) phone → nas: a step")
    assert "4.1 times slower" in rows.to_html()


def test_migrations_are_told_in_a_table() -> None:
    rows = migration_rows([migration(START_S + 2), migration(START_S + 3, error="no memory")], START_S)
    text = rows.to_text()
    for part in ("2.00 s", "900.0 ms", "200.0 ms", "80.0 ms", "60.0 ms", "240 MiB", "3.0 MiB", "failed"):
        assert part in text
    assert rows.notes[0].endswith("in 1.18 s; longest stall 60.0 ms")
    assert rows.notes[1].endswith("phone → nas: no memory")


def test_a_decision_shows_itself_with_what_was_done() -> None:
    moved, failed = migration(START_S + 2), migration(START_S + 2, error="no <memory>")
    assert str(moved).startswith("moved [")
    assert "no <memory>" in str(failed)
    html = dataclasses.replace(decision(START_S + 1, "move"), migrations=(moved, failed))._repr_html_()
    assert html.count("<table ") == 2
    assert "no &lt;memory&gt;" in html
    assert decision(START_S)._repr_html_().count("<table ") == 1
    asked = dataclasses.replace(decision(START_S, "move"), dry_run=True)
    assert str(asked).startswith("would move [")


def test_no_decisions_and_no_migrations_are_empty_tables() -> None:
    assert decision_rows([]).rows == migration_rows([]).rows == []
    assert moves_text(()) == "nothing"
