"""A pipeline that was recorded: one device becomes slow halfway, layers are moved off it, and it goes on."""

from __future__ import annotations

import random

from lingualinked.telemetry.decisions import Decision, Migration, Span
from lingualinked.telemetry.history import History
from lingualinked.telemetry.recorder import Recorder
from lingualinked.telemetry.samples import DeviceSample, StageTiming, StepSample

BEFORE: tuple[Span, ...] = (("laptop", 0, 8), ("phone", 8, 16), ("nas", 16, 24))
AFTER: tuple[Span, ...] = (("laptop", 0, 11), ("phone", 11, 13), ("nas", 13, 24))
START_S = 1000.0


def timing(device: str = "a", start: int = 0, end: int = 2, **changes: float) -> StageTiming:
    """Make one stage's part in a step, of round numbers unless told otherwise."""
    values = {"hop_s": 0.001, "wait_s": 0.002, "compute_s": 0.01, "codec_s": 0.0005, "sent_bytes": 4096} | changes
    return StageTiming(device=device, start=start, end=end, **values)


def step(
    time_s: float = START_S, *, number: int = 0, session: int = 1, tokens: int = 1, rows: int = 1, total_s: float = 0.05
) -> StepSample:
    """Make a step through two stages."""
    return StepSample(
        time_s=time_s,
        session=session,
        number=number,
        plan_version=1,
        rows=rows,
        tokens=tokens,
        context=16,
        total_s=total_s,
        stages=(timing("a", 0, 2), timing('"b"\\', 2, 5, compute_s=0.02)),
    )


def decision(time_s: float = START_S, action: str = "stay") -> Decision:
    """Make a decision about the recorded pipeline."""
    return Decision(
        time_s=time_s,
        action=action,
        trigger="device 'phone' is 4.1 times slower than before",
        reason="a step would take 41.0 ms instead of 98.0 ms: saves 17.10 s over the next 30.00 s and costs 1.40 s",
        spans_before=BEFORE,
        spans_after=AFTER,
        before_s=0.098,
        after_s=0.041,
        gain_s=17.1,
        cost_s=1.4,
        horizon_s=30.0,
        moved_bytes=6 * 40 * 1024**2,
        slowdowns={"laptop": 1.0, "phone": 4.1, "nas": 1.0},
    )


def migration(time_s: float = START_S, error: str = "") -> Migration:
    """Make a migration of the recorded pipeline."""
    return Migration(
        time_s=time_s,
        plan_version=2,
        spans_before=BEFORE,
        spans_after=AFTER,
        weight_bytes=6 * 40 * 1024**2,
        kv_bytes=3 * 1024**2,
        load_s=0.9,
        copy_s=0.2,
        switch_s=0.08,
        longest_stall_s=0.06,
        num_sessions=2,
        error=error,
    )


def recorded(num_steps: int = 800, *, num_sessions: int = 2, seed: int = 0) -> History:
    """Run that many steps, several sessions in flight, through stages that each serve one at a time."""
    rng = random.Random(seed)
    recorder = Recorder(start_s=START_S)
    free_s: dict[str, float] = {}
    issued = [(START_S + 0.5 + 0.01 * session, session, 0) for session in range(num_sessions)]
    slow_from, move_from = num_steps // 2, num_steps * 6 // 10
    done: list[StepSample] = []
    migrated = None
    for count in range(num_steps):
        time_s, session, number = issued.pop(0)
        if count == move_from:
            recorder.add_decision(decision(time_s, "move"))
            migrated = migration(time_s)
        moved = migrated is not None and time_s > migrated.time_s + 1.18
        tokens = 128 if number == 0 else 1
        now_s, stages = time_s, []
        for device, start, end in AFTER if moved else BEFORE:
            slowdown = 4.0 if device == "phone" and count >= slow_from else 1.0
            hop_s = 0.002 * rng.uniform(0.8, 1.5)
            compute_s = (end - start) * 0.0012 * slowdown * rng.lognormvariate(0, 0.06) * (1 + tokens / 40)
            arrival_s = now_s + hop_s
            begin_s = max(arrival_s, free_s.get(device, 0.0))
            now_s = free_s[device] = begin_s + compute_s + 0.0003
            stages.append(
                timing(device, start, end, hop_s=hop_s, wait_s=begin_s - arrival_s, compute_s=compute_s, codec_s=0.0003)
            )
        done.append(
            StepSample(
                time_s=time_s,
                session=session,
                number=number,
                plan_version=2 if moved else 1,
                rows=1,
                tokens=tokens,
                context=number and 127 + number,
                total_s=now_s + 0.002 - time_s,
                stages=tuple(stages),
            )
        )
        issued.append((now_s + 0.0025, session, number + 1))
        issued.sort()
        if count % 50 == 25:
            recorder.add_decision(decision(time_s))
            for index, device in enumerate(("laptop", "phone", "nas")):
                recorder.add_device(
                    DeviceSample(
                        time_s=time_s,
                        device=device,
                        held_bytes=400 * 1024**2,
                        available_bytes=2 * 1024**3,
                        cpu_percent=70.0,
                        temperature_c=None if index == 2 else 41.0 + count / 100,
                        battery_percent=80.0 - count / 100 if device == "phone" else None,
                        on_battery=device == "phone",
                    )
                )
    for each in sorted(done, key=lambda sample: sample.time_s + sample.total_s):
        recorder.add_step(each)
    if migrated is not None:
        recorder.add_migration(migrated)
    return recorder.history()
