"""Plain data is drawn as text, as HTML and as a picture."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

import lingualinked as ll
from lingualinked.console import new_console
from lingualinked.tables import Rows

PLAN = ll.Plan(
    stages=(
        ll.PlannedStage(device="a", start=0, end=2, weight_bytes=3 * 1024**2),
        ll.PlannedStage(device="<b>", start=2, end=5, weight_bytes=6 * 1024**2),
    )
)
TELEMETRY = ll.Telemetry(
    stages=tuple(
        ll.StageSnapshot(
            device=stage.device,
            start=stage.start,
            end=stage.end,
            weight_bytes=stage.weight_bytes,
            kv_bytes=1024,
            num_sessions=1,
            num_steps=num_steps,
            compute_s=0.5,
            sent_bytes=4096,
        )
        for stage, num_steps in zip(PLAN.stages, (10, 0), strict=True)
    ),
    workers=tuple(
        ll.WorkerSnapshot(device=name, pid=1, threads=1, resident_bytes=2**28, idle_resident_bytes=2**27, num_refused=0)
        for name in ("a", "<b>")
    ),
)


def test_a_plan_is_drawn() -> None:
    text, html = str(PLAN), PLAN._repr_html_()
    for part in ("5 layers in 2 stages", "exact", "[0, 2)", "[2, 5)", "3.0 MiB"):
        assert part in text
        assert part in html
    assert "&lt;b&gt;" in html
    assert "<b>" not in html
    assert html.count("width:160px") == 2


def test_a_plan_without_bytes_is_drawn() -> None:
    assert "?" in str(ll.Plan.from_spans([("a", 0, 3)]))


def test_a_plan_that_is_not_exact_says_why() -> None:
    plan = ll.Plan(stages=PLAN.stages, inexact_because="mixed accelerators")
    assert "not exact: mixed accelerators" in str(plan)


def test_telemetry_is_drawn() -> None:
    text, html = str(TELEMETRY), TELEMETRY._repr_html_()
    for part in ("50.0 ms", "410 B", "256 MiB"):
        assert part in text
        assert part in html
    assert TELEMETRY.to_dict()["stages"][0]["num_steps"] == 10


def test_telemetry_is_plotted() -> None:
    memory, compute = TELEMETRY.plot().axes
    assert [round(bar.get_width(), 3) for bar in compute.patches] == [50.0, 0.0]
    assert [round(bar.get_width()) for bar in memory.patches[:2]] == [3, 6]


def wide_rows() -> Rows:
    """A table of 89 columns in text, with a name that is as long as a terminal is narrow."""
    return Rows(
        title="What a step took on devices whose names people have chosen",
        columns=("device", "layers", "prefill", "decode", "resident"),
        rows=[
            ("the-computer-in-the-cellar-" * 2, "[0, 12)", "1,234.5 ms", "98.7 ms", "12.3 GiB"),
            ("b", "[12, 13)", "", "2 ms", "1 B"),
        ],
        notes=["a sentence of some length about what was measured and what it means for whoever reads it"],
    )


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_tables_fit_the_width_and_lose_nothing(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    rows, text = wide_rows(), wide_rows().to_text()
    assert max(map(len, text.splitlines())) <= width
    told = "".join(text.split())
    for cell in (rows.title, *rows.columns, *rows.notes, *(cell for row in rows.rows for cell in row)):
        assert "".join(cell.split()) in told
    stream = io.StringIO()
    console = Console(file=stream, width=width)
    console.print(rows)
    assert "".join(stream.getvalue().split()) == told


def test_without_a_terminal_nothing_is_wrapped_or_cut(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    rows = wide_rows()
    text = rows.to_text()
    assert len(text.splitlines()) == 6
    assert all(cell in text.splitlines()[3] for cell in rows.rows[0])
    new_console().print(rows)
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == text.splitlines()


def test_text_is_text_in_a_notebook_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """In Jupyter a rich console displays what it prints, whatever file it has, and the text would be empty."""
    text = wide_rows().to_text()
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert wide_rows().to_text() == text


def test_html_brings_its_own_looks() -> None:
    html = wide_rows().to_html()
    assert html.count("<td style=") == html.count("<td") == 10
    assert html.count("<th style=") == html.count("<th") - 1 == 5  # the other one is thead
    assert "color:inherit" in html
    assert "class=" not in html
