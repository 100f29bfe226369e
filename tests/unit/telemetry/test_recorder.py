"""A recorder remembers the recent past, counts all of it, and gives pictures that do not change."""

from __future__ import annotations

import dataclasses
import threading

import pytest

from histories import START_S, decision, migration, recorded, step
from lingualinked.telemetry.recorder import Recorder
from lingualinked.telemetry.samples import DeviceSample


def look(time_s: float, device: str = "a") -> DeviceSample:
    return DeviceSample(time_s=time_s, device=device, held_bytes=1, available_bytes=2, cpu_percent=50.0)


def test_a_new_recorder_remembers_nothing() -> None:
    history = Recorder(start_s=7.0).history()
    assert (history.steps, history.devices, history.decisions, history.migrations) == ((), (), (), ())
    assert history.start_s == history.end_s == 7.0
    assert history.counters.num_steps == history.counters.num_tokens == 0
    assert history.tokens_per_s() == 0
    assert history.utilisation() == history.latest_devices() == {}


def test_the_past_is_bounded_and_the_totals_are_not() -> None:
    recorder = Recorder(max_steps=3, max_device_samples=2, max_decisions=2, max_migrations=1, start_s=START_S)
    for number in range(10):
        recorder.add_step(step(START_S + number, number=number, rows=2, tokens=16 if number == 0 else 1))
        recorder.add_device(look(START_S + number))
        recorder.add_decision(decision(START_S + number, "move" if number == 4 else "stay"))
    recorder.add_migration(migration())
    recorder.add_migration(migration(error="no memory"))
    history = recorder.history()
    assert [each.number for each in history.steps] == [7, 8, 9]
    assert [each.time_s - START_S for each in history.devices] == [8, 9]
    assert len(history.decisions) == 2
    assert [each.error for each in history.migrations] == ["no memory"]
    counters = history.counters
    assert (counters.num_steps, counters.num_tokens) == (10, 2 * 16 + 9 * 2)
    assert (counters.prefill.num_steps, counters.prefill.num_tokens) == (1, 32)
    assert (counters.decode.num_steps, counters.decode.num_tokens) == (9, 18)
    assert counters.decode.total_s == pytest.approx(9 * 0.05)
    assert (counters.num_moves, counters.num_stays) == (1, 9)
    assert (counters.num_migrations, counters.num_failed_migrations, counters.num_moved_layers) == (1, 1, 6)
    assert counters.stall_s == pytest.approx(0.12)
    device = counters.devices["a"]
    assert (device.num_visits, device.sent_bytes) == (10, 40960)
    seconds = (device.hop_s, device.wait_s, device.compute_s, device.codec_s)
    assert seconds == pytest.approx((0.01, 0.02, 0.1, 0.005))


def test_a_history_is_a_picture_of_one_moment() -> None:
    recorder = Recorder()
    recorder.add_step(step())
    history = recorder.history()
    recorder.add_step(step(number=1))
    recorder.add_decision(decision())
    assert len(history.steps) == history.counters.num_steps == 1
    assert history.counters.devices["a"].num_visits == 1
    assert not history.decisions
    with pytest.raises(dataclasses.FrozenInstanceError):
        history.steps = ()  # type: ignore[misc]


def test_threads_add_at_once_and_nothing_is_lost() -> None:
    recorder = Recorder(max_steps=100)
    ready = threading.Barrier(5)

    def add() -> None:
        ready.wait()
        for number in range(500):
            recorder.add_step(step(number=number))
            recorder.add_device(look(START_S))

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    ready.wait()
    pictures = [recorder.history() for _ in range(50)]
    for thread in threads:
        thread.join()
    history = recorder.history()
    assert history.counters.num_steps == history.counters.devices["a"].num_visits == 2000
    assert len(history.steps) == 100
    for picture in pictures:  # none was taken in the middle of an addition
        visits = [totals.num_visits for totals in picture.counters.devices.values()]
        assert all(number == picture.counters.num_steps for number in visits)


def test_recording_begins_now_unless_told_otherwise() -> None:
    assert Recorder().history().start_s <= Recorder().history().start_s


def test_rates_are_of_the_last_seconds() -> None:
    recorder = Recorder(start_s=START_S)
    recorder.add_step(step(START_S, tokens=64, total_s=2.0))
    for number in range(100):
        recorder.add_step(step(START_S + 2 + 0.1 * number, number=number, rows=3, total_s=0.1))
    history = recorder.history()
    assert history.end_s == pytest.approx(START_S + 12)
    assert history.tokens_per_s(5.0) == pytest.approx(30)
    assert history.tokens_per_s(1000.0) == pytest.approx(300 / 12)
    busy = history.utilisation(5.0)
    assert list(busy) == ["a", '"b"\\']
    assert busy["a"] == pytest.approx(0.0105 / 0.1)
    assert busy['"b"\\'] == pytest.approx(0.0205 / 0.1)


def test_where_nothing_is_decoded_all_tokens_are_the_rate() -> None:
    recorder = Recorder(start_s=START_S)
    recorder.add_step(step(tokens=64, total_s=2.0))
    assert recorder.history().tokens_per_s() == pytest.approx(32)


def test_a_step_that_took_no_time_is_no_division_by_zero() -> None:
    recorder = Recorder(start_s=START_S)
    recorder.add_step(step(total_s=0.0))
    history = recorder.history()
    assert history.tokens_per_s() == 0
    assert set(history.utilisation().values()) == {0.0}


def test_the_last_look_at_each_device_is_found() -> None:
    latest = recorded(200).latest_devices()
    assert set(latest) == {"laptop", "phone", "nas"}
    assert latest["phone"].time_s == max(sample.time_s for sample in recorded(200).devices)
