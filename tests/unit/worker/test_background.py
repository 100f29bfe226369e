"""Jobs run in order beside the loop, and their callbacks run on it."""

from __future__ import annotations

import threading

from lingualinked.worker.background import Background


def test_jobs_run_in_order_and_speak_on_the_loop() -> None:
    woken = threading.Semaphore(0)
    background = Background(woken.release)
    said: list[tuple[int, bool]] = []
    threads: set[int] = set()

    def job(number: int) -> None:
        threads.add(threading.get_ident())
        background.call_on_loop(lambda: said.append((number, threading.current_thread() is threading.main_thread())))

    for number in range(3):
        background.submit(lambda number=number: job(number))
    for _ in range(3):
        assert woken.acquire(timeout=10)
    assert said == []
    background.run_callbacks()
    assert said == [(0, True), (1, True), (2, True)]
    assert len(threads) == 1
    assert threading.get_ident() not in threads
    background.submit(lambda: said.append((3, False)))
    background.stop()
    assert said[-1] == (3, False)
