"""The pytest plugin in a project of somebody else: what its fixtures give, and that nothing of them is left behind.

pytest runs in a process of its own, and finds the plugin by the entry point that pyproject.toml declares.
"""

from __future__ import annotations

import itertools
import json
import re
import tomllib
from pathlib import Path

import psutil
import pytest

from waiting import wait_until

pytestmark = [pytest.mark.process, pytest.mark.slow, pytest.mark.timeout(240)]
pytest_plugins = ["pytester"]

ROOT = Path(__file__).parents[2]

# Writes down each test's workers; once a test is over, those that are not kept for the next one are gone.
CONFTEST = """
import json, pathlib, psutil, pytest, threading

NOTES = pathlib.Path("pids.jsonl")

@pytest.fixture(autouse=True)
def noted(request, cluster):
    with NOTES.open("a") as file:
        folder = cluster._workers.socket_folder
        print(json.dumps([request.node.name, [sorted(cluster.pids.values()), folder]]), file=file)

@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    result = yield
    lines = NOTES.read_text().splitlines() if NOTES.exists() else ()
    pids, folder = dict(map(json.loads, lines)).get(item.name, ((), ""))
    if "kept" not in item.name:
        assert not any(map(psutil.pid_exists, pids)), f"workers of {item.name} outlive it"
        assert not [each for each in threading.enumerate() if each.name.startswith("lingualinked")], item.name
        assert not folder or not pathlib.Path(folder).exists(), f"sockets of {item.name} outlive it"
    return result
"""


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """An empty project, in whose environment the plugin is installed as a wheel would do it."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]
    site = pytester.mkdir("site")
    metadata = site / "plugin_as_installed-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin-as-installed\nVersion: 0\n")
    lines = [f"{name} = {module}" for name, module in declared["pytest11"].items()]
    (metadata / "entry_points.txt").write_text("\n".join(["[pytest11]", *lines]))
    monkeypatch.setenv("PYTHONPATH", str(site))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # others take longer to load than the tests run
    pytester.makeini(
        "[pytest]\nfilterwarnings = error\naddopts = --strict-markers -p lingualinked -p pytest_timeout -p xdist"
    )
    pytester.makeconftest(CONFTEST)
    return pytester


def workers(project: pytest.Pytester) -> dict[str, list[int]]:
    """Return the process ids of each test's workers."""
    lines = (project.path / "pids.jsonl").read_text().splitlines()
    return {name: pids for name, (pids, _) in map(json.loads, lines)}


def test_fixtures_marker_and_traces(project: pytest.Pytester) -> None:
    project.makepyfile(
        test_foreign="""
        import os, signal, threading
        import pytest, torch
        import lingualinked as ll

        IDS = torch.tensor([[1, 17, 93, 54, 8]])
        pytestmark = pytest.mark.lingualinked(devices=1)

        @pytest.mark.lingualinked(devices=[1, [ll.Device(name="near", threads=1), ll.Device(name="far", latency="1ms")]])
        @pytest.mark.parametrize("num_tokens", [2])
        def test_numbers_of_devices(sharded_model, cluster, num_tokens):
            assert len(sharded_model.plan.stages) == len(cluster.devices)
            assert sharded_model.generate(IDS, max_new_tokens=num_tokens, do_sample=False).shape == (1, 7)

        def test_own_models(request):
            cluster = request.getfixturevalue("cluster")
            for _ in range(2):
                ll.ShardedModel.from_pretrained(ll.sample_model(), cluster=cluster, plan="even", progress=False)(IDS)

        @pytest.mark.lingualinked(scope="module")
        class TestKept:
            def test_kept_first(self, sharded_model):
                sharded_model(IDS)

            def test_kept_second(self, sharded_model):
                assert len(sharded_model.telemetry.steps) == 1
                sharded_model(IDS)
                sharded_model.cluster.kill("worker-0")

            def test_kept_third(self, sharded_model):
                sharded_model(IDS)

        def test_fails(sharded_model):
            assert sharded_model(IDS) is None

        @pytest.mark.lingualinked(model="nowhere", local_files_only=True)
        def test_fixture_fails(sharded_model):
            pass

        @pytest.mark.timeout(0.5, method="signal", func_only=True)
        def test_is_too_slow():
            threading.Event().wait()

        def test_is_interrupted():
            os.kill(os.getpid(), signal.SIGINT)
        """
    )
    page = (ROOT / "docs" / "howto" / "pytest.md").read_text(encoding="utf-8")
    project.makepyfile(test_as_documented="\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)))
    result = project.runpytest_subprocess(
        "test_as_documented.py", "test_foreign.py", "--lingualinked-trace=traces", timeout=220
    )
    result.assert_outcomes(passed=12, failed=2, errors=1)
    result.stdout.fnmatch_lines_random(["*CheckpointError*nowhere*", "*Timeout*"])
    ran = workers(project)
    assert result.ret == pytest.ExitCode.INTERRUPTED
    assert {
        "test_numbers_of_devices[devices=near+far-2]",
        "test_fails[devices=1]",
        "test_is_too_slow[devices=1]",
        "test_is_interrupted[devices=1]",
    } <= ran.keys()
    assert ran["test_kept_first[devices=1]"] == ran["test_kept_second[devices=1]"]
    assert ran["test_kept_second[devices=1]"] != ran["test_kept_third[devices=1]"]  # of a cluster that was not harmed
    assert not any(map(psutil.pid_exists, itertools.chain(*ran.values())))
    traces = {path.name: json.loads(path.read_text()) for path in (project.path / "traces").iterdir()}
    # Of each test in which a model made a step, also of the one that fails; of one of them two.
    assert len(traces) == 13
    assert "test_foreign.py_test_own_models_devices=1_-2.json" in traces
    steps = [
        event
        for event in traces["test_foreign.py_TestKept_test_kept_second_devices=1_.json"]["traceEvents"]
        if event["name"] == "prefill"
    ]
    assert len(steps) == 2  # the caller's and the stage's: of the second test alone


def test_side_by_side_under_xdist(project: pytest.Pytester) -> None:
    project.makepyfile(
        """
        import pytest, threading

        @pytest.mark.lingualinked(devices=[1, 2])
        @pytest.mark.timeout(0.5, method="thread", func_only=True)
        def test_devices(cluster):
            if len(cluster.devices) == 2:
                threading.Event().wait()
        """
    )
    result = project.runpytest_subprocess("-n2", timeout=220)
    result.assert_outcomes(passed=1, failed=1)
    pids = list(itertools.chain(*workers(project).values()))
    assert len(set(pids)) == 3
    wait_until(lambda: not any(map(psutil.pid_exists, pids)))  # one pytest process has ended where it stood
