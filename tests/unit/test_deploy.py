"""The files in deploy/ can be read by what they are for, agree with each other, and use options that the commands have."""

from __future__ import annotations

import configparser
import inspect
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from lingualinked.cli import keys_command
from lingualinked.worker.daemon.command import serve

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
PAGES = [
    ROOT / "docs" / "machines.md",
    *(ROOT / "docs" / "howto" / f"{name}.md" for name in ("ray", "slurm", "kubernetes")),
]
STARTERS = [*DEPLOY.iterdir(), PAGES[0]]

WORKER_OPTIONS = {f"--{name.replace('_', '-')}" for name in inspect.signature(serve).parameters}


def manifests() -> dict[str, Any]:
    text = (DEPLOY / "kubernetes.yaml").read_text(encoding="utf-8")
    return {f"{each['kind']}/{each['metadata']['name']}": each for each in yaml.safe_load_all(text)}


@pytest.mark.parametrize("path", STARTERS, ids=lambda path: path.name)
def test_options_that_are_shown_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"\bworker +(--[^#`|>&\n]*)", text) + re.findall(r"- worker\n((?:\s+- --.*\n)+)", text)
    if path.name == "Containerfile":
        commands = re.findall(r'^CMD \["worker", (.*)\]', text, re.MULTILINE)
    if path.name == "machines.md":
        commands += re.findall(r"^\| (`--.*?) \| ", text, re.MULTILINE)
    used = {option for command in commands for option in re.findall(r"--[a-z-]+", command)}
    assert set() < used <= WORKER_OPTIONS


@pytest.mark.parametrize("path", [*DEPLOY.iterdir(), *PAGES], ids=lambda path: path.name)
def test_commands_on_keys_that_are_shown_exist(path: Path) -> None:
    commands = {info.name or info.callback.__name__ for info in keys_command.app.registered_commands if info.callback}
    assert set(re.findall(r"lingualinked keys (\w+)", path.read_text(encoding="utf-8"))) <= commands


def test_kubernetes_objects_refer_to_each_other() -> None:
    objects = manifests()
    workers, service = objects["StatefulSet/worker"]["spec"], objects["Service/worker"]
    labels = workers["template"]["metadata"]["labels"]
    assert service["spec"]["selector"] == workers["selector"]["matchLabels"] == labels
    assert workers["serviceName"] == service["metadata"]["name"]
    (worker,) = workers["template"]["spec"]["containers"]
    (claim,) = workers["volumeClaimTemplates"]
    volumes = {claim["metadata"]["name"], *(each["name"] for each in workers["template"]["spec"]["volumes"])}
    assert {each["name"] for each in worker["volumeMounts"]} == volumes
    references = [
        each["valueFrom"]["configMapKeyRef"] for each in worker["env"] if "configMapKeyRef" in each["valueFrom"]
    ]
    assert all(each["key"] in objects[f"ConfigMap/{each['name']}"]["data"] for each in references)
    policy = objects["NetworkPolicy/lingualinked-worker"]["spec"]
    assert policy["podSelector"]["matchLabels"] == labels
    assert {"podSelector": {"matchLabels": objects["Job/caller"]["spec"]["template"]["metadata"]["labels"]}} in policy[
        "ingress"
    ][0]["from"]


def test_the_cluster_file_on_kubernetes_names_the_pods() -> None:
    objects = manifests()
    workers = objects["StatefulSet/worker"]["spec"]
    cluster = tomllib.loads(objects["ConfigMap/lingualinked-cluster"]["data"]["cluster.toml"])
    names = [f"worker-{index}" for index in range(workers["replicas"])]
    assert [device["name"] for device in cluster["devices"]] == names
    port = workers["template"]["spec"]["containers"][0]["ports"][0]["containerPort"]
    assert [device["address"] for device in cluster["devices"]] == [f"tcp://{name}.worker:{port}" for name in names]


def test_the_unit_is_one_of_systemd() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(DEPLOY / "lingualinked-worker.service", encoding="utf-8")
    assert unit.sections() == ["Unit", "Service", "Install"]
    assert {"User", "ProtectSystem", "NoNewPrivileges", "StateDirectory"} <= set(unit["Service"])


def test_the_job_of_slurm_is_a_program_of_bash() -> None:
    subprocess.run(["bash", "-n", DEPLOY / "slurm.sh"], check=True)
