"""The models that a measurement compares: the sharded one, the uncut one on the same cores, and LinguaLinked's way.

Knows checkpoints, built-in shapes and devices; each model is loaded when it is first needed. Measures nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList

import lingualinked as ll
from lingualinked.cli.bench.peers.disk_offload import load_offloaded
from lingualinked.cli.bench.peers.llama_cpp import LlamaCpp, check_programs, write_gguf
from lingualinked.cli.bench.shapes import SHAPES
from lingualinked.cli.bench.timing import torch_threads
from lingualinked.cli.demo_command import unsharded
from lingualinked.cli.devices_option import read_devices
from lingualinked.cli.plan_command import load_format_of
from lingualinked.cluster_file import ClusterDescription
from lingualinked.model.spec import ModelSpec
from lingualinked.model.weights.span_loading import load_span
from lingualinked.processor import usable_cores
from lingualinked.quantities import bytes_text

MODES = ("uncut-1", "uncut-2", "one-step", "lingualinked", "accelerate", "llama.cpp")
"""What a sharded model can be compared with, by the names of ``--against``."""

SAMPLE = "sample"
"""The name of the checkpoint that the package brings."""

_FIRST_ID = 3  # lower ids are often padding, beginning and end of text


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What all measurements share: the model, its devices, what it is compared with, and how often."""

    model: str = "160m"  # a folder, a hub id, or the name of a built-in shape
    devices: str = "2"
    dtype: str = "auto"
    plan: str | None = None  # "even", or a file that `lingualinked plan --json` wrote
    against: tuple[str, ...] = ("uncut-1", "uncut-2")
    repeats: int = 3
    slowdown: float = 1.0  # of each local device
    llama_cpp: Path | None = None  # folder of its programs, else PATH
    progress: bool = False

    def __post_init__(self) -> None:
        for mode in self.against:
            if mode not in MODES:
                raise ll.ArgumentError(f"--against {mode!r} must be one of {', '.join(MODES)}")
        if "llama.cpp" in self.against:
            check_programs(self.llama_cpp)


class BenchModels:
    """The models of one measurement; a context manager that closes what was loaded."""

    def __init__(self, options: BenchOptions, workload: ll.Workload | None = None) -> None:
        self.options = options
        self.workload = workload  # that is measured; None: any
        self._stack = contextlib.ExitStack()
        self._models: dict[str, Any] = {}
        of_shape = options.model in SHAPES
        self.load_format = "dummy" if of_shape else "auto" if options.model == SAMPLE else load_format_of(options.model)
        self.description = _describe_devices(options)

    def __enter__(self) -> Self:
        torch.set_num_threads(1)
        self.path = ll.sample_model() if self.options.model == SAMPLE else self.options.model
        if self.load_format == "dummy" and not Path(self.path).is_dir():
            self.path = self._stack.enter_context(tempfile.TemporaryDirectory())
            config = dict(SHAPES[self.options.model])
            if self.options.dtype != "auto":
                config["torch_dtype"] = self.options.dtype
            (Path(self.path) / "config.json").write_text(json.dumps(config))
        return self

    def __exit__(self, *_: object) -> None:
        self._models.clear()
        self._stack.close()

    @functools.cached_property
    def cluster(self) -> ll.Cluster:
        """The workers that all sharded models of this measurement share."""
        return self._stack.enter_context(ll.Cluster(self.description))

    @property
    def sharded(self) -> Any:
        """The model cut by the plan that was asked for."""
        return self._sharded("sharded", _read_plan(self.options.plan))

    @property
    def paper_way(self) -> Any:
        """The model cut as LinguaLinked's planner cuts it: the sum of costs, or even parts if nothing was measured."""
        plan = self.sharded.plan
        if plan.profile is None:
            return self._sharded("lingualinked", "even")
        return self._sharded("lingualinked", ll.baseline(plan.profile, "sum_objective", workload=self.workload))

    @property
    def uncut(self) -> Any:
        """The uncut model in this process, with the sharded one's weights."""
        if "uncut" not in self._models:
            _check_memory(self.sharded)
            if self.load_format == "dummy":
                self._models["uncut"] = uncut_dummy(self.path, self.options.dtype)
            else:
                self._models["uncut"] = unsharded(self.path, self.options.dtype)
        return self._models["uncut"]

    @property
    def disk_offloaded(self) -> Any:
        """The uncut model by accelerate, half of whose layers are read from disk at every step."""
        if "offloaded" not in self._models:
            folder = self._stack.enter_context(tempfile.TemporaryDirectory())
            self._models["offloaded"] = load_offloaded(self.path, self.uncut, folder)
        return self._models["offloaded"]

    @functools.cached_property
    def llama_cpp(self) -> LlamaCpp:
        """llama.cpp over RPC, with a server for each stage."""
        folder = self._stack.enter_context(tempfile.TemporaryDirectory())
        path = Path(folder) / "model.gguf"
        write_gguf(self.sharded.config, path)
        stages = self.sharded.plan.stages
        cores = {device.name: device.cpus or () for device in self.cluster.devices}
        layers = [stage.num_layers for stage in stages]
        llama_cpp = LlamaCpp(self.options.llama_cpp, path, layers, [cores[stage.device] for stage in stages])
        self._stack.callback(llama_cpp.close)
        return llama_cpp

    def draw_ids(self, rows: int, tokens: int, seed: int = 0) -> torch.Tensor:
        """Draw random token ids, int64 ``[rows, tokens]``; equal seeds draw equal ids."""
        return draw_ids(self.sharded, rows, tokens, seed)

    def uncut_sides(self, measure: Callable[[Any], float]) -> dict[str, Callable[[], float]]:
        """Return the uncut model's sides among those that were asked for, each with its number of threads."""
        sides: dict[str, Callable[[], float]] = {}
        for mode, threads in (("uncut-1", 1), ("uncut-2", 2)):
            if mode in self.options.against:
                sides[mode] = functools.partial(_measure_with_threads, threads, measure, self.uncut)
        return sides

    def _sharded(self, name: str, plan: Any) -> Any:
        if name not in self._models:
            self._models[name] = self._stack.enter_context(
                ll.ShardedModel.from_pretrained(
                    self.path,
                    cluster=self.cluster,
                    plan=plan,
                    workload=self.workload,
                    dtype=self.options.dtype,
                    load_format=self.load_format,
                    progress=self.options.progress,
                )
            )
        return self._models[name]


def draw_ids(model: Any, rows: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """Draw random token ids of a model's vocabulary; equal seeds draw equal ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(_FIRST_ID, model.config.get_text_config().vocab_size, (rows, tokens), generator=generator)


def uncut_dummy(folder: str, dtype: str = "auto") -> Any:
    """Make the uncut transformers model with the weights that ``load_format="dummy"`` fills."""
    config = AutoConfig.from_pretrained(folder)
    name = str(config.dtype or torch.float32).removeprefix("torch.") if dtype == "auto" else dtype
    spec = ModelSpec(
        class_name=config.architectures[0],
        config_json=config.to_json_string(use_diff=False),
        dtype=name,
        attn_implementation=None,
        load_format="dummy",
        files=(),
    )
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, name))
    model.load_state_dict(load_span(spec, 0, config.num_hidden_layers).model.state_dict())
    return model.eval()


class _Unchanged(LogitsProcessor):
    """A processor of a user's own, which only the caller can run: so each step waits for the one before."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # noqa: ARG002 - transformers' signature
        return scores


def one_at_a_time() -> dict[str, Any]:
    """Return arguments of `generate` with which a sharded model runs one step of the whole batch after another."""
    return {"logits_processor": LogitsProcessorList([_Unchanged()]), "num_microbatches": 1}


def _measure_with_threads(threads: int, measure: Callable[[Any], float], model: Any) -> float:
    with torch_threads(threads):
        return measure(model)


def _describe_devices(options: BenchOptions) -> ClusterDescription:
    """Read the devices; those that are a number are pinned to equal shares of the cores, if there is one for each."""
    asked = read_devices(options.devices)
    if not options.devices.isdecimal():
        if options.slowdown != 1:
            raise ll.ArgumentError(
                f"--slowdown {options.slowdown:g} has no effect on {options.devices}, which says what its devices are: leave it out"
            )
        return asked
    number, cores = len(asked.devices), _cores()
    share = len(cores) // number if options.slowdown == 1 else 0
    devices = tuple(
        dataclasses.replace(
            device,
            threads=max(1, share),
            cpus=tuple(cores[index * share : (index + 1) * share]) or None,
            slowdown=options.slowdown,
        )
        for index, device in enumerate(asked.devices)
    )
    return dataclasses.replace(asked, devices=devices)


def _cores() -> Sequence[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(usable_cores())


def _check_memory(sharded: Any) -> None:
    needed, free = sharded.get_memory_footprint(), psutil.virtual_memory().available
    if needed > free:
        raise ll.ArgumentError(
            f"the uncut model takes {bytes_text(needed)} and {bytes_text(free)} of memory are free: leave uncut-1 and uncut-2 "
            "out of --against"
        )


def _read_plan(plan: str | None) -> Any:
    """Read ``--plan``: nothing, "even", or a file that ``lingualinked plan --json`` wrote."""
    if plan is None or plan == "even":
        return plan
    try:
        text = Path(plan).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ll.ArgumentError(
            f"no plan can be read from --plan {plan!r} ({error}): give a file written by `lingualinked plan --json`, "
            "or even"
        ) from error
    return ll.Plan.from_json(text)
