"""The pytest plugin: fixtures with workers behind them, and a trace of each test.

Loads lingualinked's heavy parts only when a test asks for a fixture.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from lingualinked.testing.setup import MARK, Setup, setups_of

if TYPE_CHECKING:
    from lingualinked.sharded.model import ShardedModel
    from lingualinked.testing.faulty_cluster import FaultyCluster
    from lingualinked.testing.provider import Provider


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--lingualinked-trace``."""
    parser.getgroup("lingualinked").addoption(
        "--lingualinked-trace",
        metavar="DIR",
        help="write a timeline of each test's sharded models to this folder, for https://ui.perfetto.dev",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker, and what writes traces if they are asked for."""
    config.addinivalue_line(
        "markers",
        f"{MARK}(devices=2, model=None, scope='function', **arguments): what the fixtures `cluster` and `sharded_model` "
        "run on: a number of workers, a list of lingualinked.Device or a cluster file, or a list of these, for one run with each; "
        "a checkpoint (None: the bundled one); how long both are kept; arguments of ShardedModel.from_pretrained",
    )
    folder = config.getoption("--lingualinked-trace")
    if folder is not None:
        from lingualinked.testing.traces import TraceWriter  # imports telemetry

        config.pluginmanager.register(TraceWriter(folder), "lingualinked-trace")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a marked test once with each number or list of devices."""
    test = metafunc.definition
    if "_provider" in metafunc.fixturenames and test.get_closest_marker(MARK) is not None:
        setups = [_interned(metafunc.config, each) for each in setups_of(test)]
        labels = [each.label for each in setups]
        metafunc.parametrize("_provider", setups, indirect=True, ids=labels, scope=setups[0].scope)


_SETUPS = pytest.StashKey[list[Setup]]()


def _interned(config: pytest.Config, setup: Setup) -> Setup:
    """Return the same object for equal setups: pytest keeps a fixture as long as its parameter is the same object."""
    known = config.stash.setdefault(_SETUPS, [])
    for each in known:
        if each == setup:
            return each
    known.append(setup)
    return setup


def _setup_of(request: pytest.FixtureRequest) -> Setup:
    """Return the setup that a test runs with: its parameter, or what its markers say if it was requested within the test."""
    setup = getattr(request, "param", None)
    if isinstance(setup, Setup):
        return setup
    setups = setups_of(request.node)
    if len(setups) > 1 or setups[0].scope != "function":
        raise pytest.UsageError(
            f"too late for devices= or scope= of @pytest.mark.{MARK}, since {request.node.nodeid} is running: name the fixture "
            "among the test's arguments"
        )
    return setups[0]


@pytest.fixture(scope="session")
def _fork_server() -> Iterator[None]:
    """Keep the process that forks the workers of all clusters: starting it takes longer than most tests."""
    from lingualinked.processes.launch import kept_fork_server  # imports what starts processes

    with kept_fork_server():
        yield


@pytest.fixture
def _provider(request: pytest.FixtureRequest, _fork_server: None) -> Iterator[Provider]:
    """Own the cluster and the model, as long as the marker's ``scope`` says."""
    from lingualinked.testing.provider import Provider  # imports what models need

    with Provider(_setup_of(request)) as provider:
        yield provider


@pytest.fixture
def cluster(_provider: Provider) -> FaultyCluster:
    """Return a `FaultyCluster` of the devices that the test's marker asks for; its workers are gone after the test."""
    return _provider.cluster


@pytest.fixture
def sharded_model(_provider: Provider) -> ShardedModel:
    """Return a `ShardedModel` on `cluster`: the bundled one, its layers on all devices, unless the marker says otherwise."""
    return _provider.model
