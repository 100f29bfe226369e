"""Callers, daemons and the network between them end without a word: what is noticed, and what is left."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from network.hosts import Network
from network.lab import CLOSE, GENERATE, GONE_S, NAMED_S, SLACK, Lab, log
from network.machines import Caller, CallerError, Daemon
from network.uncut import PROMPT, Uncut
from waiting import wait_until

pytestmark = pytest.mark.slow


def test_a_killed_caller_loses_its_workers_and_another_one_no_token(lab: Lab, uncut: Uncut) -> None:
    lab.open()
    daemon = lab.daemons[0]
    of_this = daemon.worker_pids
    with Caller(lab.laptop) as other:
        lab.open(other)
        of_other = daemon.worker_pids - of_this
        assert of_this
        assert of_other
        lab.caller.ask(GENERATE, num_new=100, prompt=PROMPT)
        other.ask(GENERATE, num_new=150, prompt=PROMPT)
        time.sleep(0.5)  # both are in the middle of it
        other.kill()
    began_s = time.monotonic()
    wait_until(lambda: not daemon.worker_pids & of_other, GONE_S * SLACK)
    log.info(f"workers of a killed caller were gone after {time.monotonic() - began_s:.2f} s")
    assert lab.caller.answer() == uncut.tokens(100)
    assert daemon.worker_pids == of_this


@pytest.mark.parametrize("cut_s", [8, pytest.param(60, marks=pytest.mark.lengthy)])
def test_a_cut_network_is_named_and_nothing_hangs_when_it_is_back(lab: Lab, uncut: Uncut, cut_s: int) -> None:
    lab.open()
    lab.caller.ask(GENERATE, num_new=400, prompt=PROMPT)
    time.sleep(0.5)
    host = lab.hosts[1]
    host.cut()
    began_s = time.monotonic()
    with pytest.raises(CallerError) as raised:
        lab.caller.answer()
    log.info(f"a cut was named after {time.monotonic() - began_s:.2f} s: {raised.value.message}")
    assert raised.value.kind == "WorkerDiedError"
    assert host.name in raised.value.message
    assert time.monotonic() - began_s < 4 * SLACK
    wait_until(lambda: not lab.daemons[1].worker_pids, GONE_S * SLACK)
    log.info(f"workers that were cut off were gone after {time.monotonic() - began_s:.2f} s")
    time.sleep(max(0.0, cut_s - (time.monotonic() - began_s)))
    host.mend()
    lab.caller.run(CLOSE, timeout_s=30)
    lab.open()
    assert lab.tokens() == uncut.tokens(12)


@pytest.mark.lengthy
def test_a_killed_daemon_is_named_and_another_one_in_its_place_serves(
    network: Network, checkpoint: Path, uncut: Uncut
) -> None:
    lab = Lab(network, checkpoint)
    lab.open()
    lab.caller.ask(GENERATE, num_new=400, prompt=PROMPT)
    time.sleep(0.5)
    daemon = lab.daemons[1]
    daemon.program.process.kill()
    began_s = time.monotonic()
    with pytest.raises(CallerError) as raised:
        lab.caller.answer()
    log.info(f"a killed daemon was named after {time.monotonic() - began_s:.2f} s: {raised.value.message}")
    assert raised.value.kind == "WorkerDiedError"
    assert daemon.host.name in raised.value.message
    assert time.monotonic() - began_s < NAMED_S * SLACK
    assert not daemon.host.left()
    lab.caller.run(CLOSE, timeout_s=30)
    daemon.restart()
    lab.open()
    assert lab.tokens() == uncut.tokens(12)


@pytest.mark.parametrize("number", [6, pytest.param(50, marks=pytest.mark.lengthy)])
def test_starts_and_stops_leave_nothing_in_the_daemon(lab: Lab, number: int) -> None:
    daemon = lab.daemons[0]
    cycle = f"cluster = ll.Cluster([{daemon.device()}]); cluster.wait(); cluster.close()"
    for _ in range(3):
        lab.caller.run(cycle)
    before = _holdings(daemon, lab.caller)
    for _ in range(number):
        lab.caller.run(cycle)
    allowed = {name: value + (4 << 20 if name.endswith("bytes") else 0) for name, value in before.items()}

    def is_flat() -> bool:  # libzmq closes the last connection a moment after it has ended
        return all(value <= allowed[name] for name, value in _holdings(daemon, lab.caller).items())

    wait_until(is_flat)
    log.info(f"{number} starts and stops: {before} became {_holdings(daemon, lab.caller)}")


def _holdings(daemon: Daemon, caller: Caller) -> dict[str, int]:
    wait_until(lambda: not daemon.worker_pids)
    found = {}
    for name, process in (("caller", psutil.Process(caller.program.process.pid)), *_named(daemon)):
        found[f"{name} descriptors"] = process.num_fds()
        found[f"{name} threads"] = process.num_threads()
        found[f"{name} bytes"] = process.memory_info().rss
    return found | {"processes": len(daemon.host.pids())}


def _named(daemon: Daemon) -> Iterator[tuple[str, psutil.Process]]:
    for number, pid in enumerate(sorted(daemon.host.pids())):
        yield ("daemon" if pid == daemon.pid else f"its process {number}"), psutil.Process(pid)
