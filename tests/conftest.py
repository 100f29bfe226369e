"""For every test: one compute thread, a private temporary folder, and the check that nothing is left behind.

Knows no lingualinked. What a session or module fixture holds when a test begins is that fixture's, not the test's.
"""

from __future__ import annotations

import gc
import os
import tempfile
import uuid
from collections.abc import Iterator

import hypothesis
import pytest

from leftovers import RUN_VARIABLE, SHARED_MEMORY, Belongings, left_since

gc.disable()  # until all tests are collected
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may depend on a network; read when huggingface_hub is imported
os.environ["MPLBACKEND"] = "agg"

hypothesis.settings.register_profile("default", deadline=None)  # no test asserts a time
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--accelerator",
        help="where the compared models compute ('cuda', 'cuda:1', 'cpu'): run only tests that compare bits, there",
    )
    parser.addoption(
        "--families",
        metavar="TEXT",
        help="of tests that go through all architectures, run those of the usual ones, and of others that the text draws",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with files of slow tests, so that none is left for the end, when other processes have nothing to do.

    With ``--families``, leave out what it does not draw. With ``--accelerator``, leave only the tests of equality, and skip
    them where there is no such accelerator.
    """
    text = config.getoption("--families")
    if text is not None:
        import drawn_families

        left_out = drawn_families.not_drawn(items, text)
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]
    asked = config.getoption("--accelerator")
    if asked is None:
        slow = {item.path for item in items if item.get_closest_marker("slow") is not None}
        items.sort(key=lambda item: item.path not in slow)
        return
    import torch

    import accelerators

    accelerators.chosen, accelerators.is_asked_for = "cuda:0" if asked == "cuda" else asked, True
    config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("equality") is None])
    items[:] = [item for item in items if item.get_closest_marker("equality") is not None]
    if accelerators.chosen.startswith("cuda") and not torch.cuda.is_available():
        for item in items:
            item.add_marker(pytest.mark.skip(reason="torch finds no CUDA GPU on this machine"))
    for item in items if accelerators.chosen != "cpu" else ():
        mark = item.get_closest_marker("cpu_only")
        if mark is not None:
            item.add_marker(pytest.mark.skip(reason=mark.kwargs["reason"]))


def pytest_collection_finish() -> None:
    """Keep the garbage collector from going through a million objects again and again that stay to the end."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Compute with one thread, as the workers that are compared with do: another number shifts the last bits."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Give the run a temporary folder that nobody else writes to; subprocesses inherit it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(tmp_path_factory.mktemp("run")))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))  # profiles and plans are kept there
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))  # torch's own, made on import
        patch.setattr(tempfile, "tempdir", None)
        yield


@pytest.fixture(scope="session", autouse=True)
def accelerator_in_use(request: pytest.FixtureRequest) -> None:
    """What the driver opens for this process stays open; so it is before a test begins."""
    if request.config.getoption("--accelerator") is not None:
        import torch

        import accelerators

        matrix = torch.ones(16, 16, device=accelerators.chosen)
        (matrix @ matrix).cpu()


@pytest.fixture(scope="session", autouse=True)
def nothing_outlives_the_session(one_thread: None, temporary_folder: None, accelerator_in_use: None) -> Iterator[None]:
    """Fail if the shared fixtures leave a process, thread, file or shared memory; descriptors of loaded libraries may stay."""
    os.environ[RUN_VARIABLE] = uuid.uuid4().hex
    before = Belongings.now()
    yield
    left = [item for item in left_since(before) if " more of " not in item or SHARED_MEMORY in item]
    assert not left, "left behind by the session: " + "; ".join(left)


@pytest.fixture(autouse=True)
def nothing_left_behind(nothing_outlives_the_session: None) -> Iterator[None]:
    """Fail a test that leaves a process, a thread, a descriptor or a temporary file.

    Set up before the test's other fixtures and after those of wider scope, so torn down after the one and
    before the other. A test that gets a wider fixture by ``request.getfixturevalue`` counts it as its own.
    Shared memory is opened when it is first needed, by wider fixtures too, so it is counted in the end.
    """
    before = Belongings.now()
    yield
    left = left_since(before, ignored=SHARED_MEMORY)
    assert not left, "left behind: " + "; ".join(left)
