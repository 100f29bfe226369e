"""A running pipeline in a terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

import lingualinked as ll
from histories import AFTER, recorded
from lingualinked.display.live import live_view


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_it_fits_the_terminal(width: int) -> None:
    stages = tuple(
        ll.StageSnapshot(
            device=device,
            start=start,
            end=end,
            weight_bytes=1,
            kv_bytes=0,
            num_sessions=1,
            num_steps=1,
            compute_s=0.5,
            sent_bytes=0,
        )
        for device, start, end in AFTER
    )
    telemetry = ll.Telemetry(stages=stages, workers=(), history=recorded())
    stream = io.StringIO()
    Console(file=stream, width=width).print(live_view(telemetry, note="as usual", width=width))
    lines = stream.getvalue().splitlines()
    assert {len(line) for line in lines} == {width}
    for device, start, end in AFTER:
        (line,) = (line for line in lines if line.startswith(f"│ {device} "))
        assert f"[{start}, {end})" in line
        assert "ms" in line
        assert "█" in line or "%" in line
