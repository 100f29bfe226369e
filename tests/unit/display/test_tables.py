"""Plain data is drawn as text, as HTML and as a picture."""

from __future__ import annotations

import lingualinked as ll

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
    assert html.count("<div") == 2


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
