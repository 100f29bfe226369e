"""Loads a model: describes it, places its layers, loads the stages, and makes the object that users get.

Knows the order of these steps; the pipeline talks to the workers.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar, cast

from lingualinked.cluster.pipeline import Pipeline
from lingualinked.control.policy import RebalancePolicy
from lingualinked.errors import ArgumentError, UnsupportedOperationError
from lingualinked.model.cutting.parts import build_meta
from lingualinked.planning.plan import Plan
from lingualinked.sharded.adapters.adapter_files import check_name, open_adapter
from lingualinked.sharded.calling.encoder_decoder import Stacked, make_encoder_decoder
from lingualinked.sharded.calling.forward import make_sharded
from lingualinked.sharded.loading.arguments import LoadArguments
from lingualinked.sharded.loading.describing import Described, describe
from lingualinked.sharded.loading.model_code import ModelCode
from lingualinked.sharded.loading.placing import find_or_fit_plan
from lingualinked.sharded.loading.progress import DeviceProgress
from lingualinked.sharded.profiles.rebalancing import enable_rebalancing

_Base = TypeVar("_Base")


def load(arguments: LoadArguments, base: type[_Base]) -> _Base:
    """Load a checkpoint into the workers of a cluster; raises like `ShardedModel.from_pretrained`."""
    cluster = arguments.cluster
    assert cluster is not None
    # 1) read config and headers
    described = describe(arguments)
    spec = described.spec
    code = ModelCode(build_meta(dataclasses.replace(spec, stack="")) if spec.stack else described.meta)
    of_adapter: dict[str, Any] = {}
    if arguments.adapter is not None and not spec.stack:
        of_adapter = {name: value for name, value in arguments.hub.items() if name != "token"} | {
            **arguments.adapter_kwargs
        }
        open_adapter(described.spec, check_name(arguments.adapter_name), arguments.adapter, **of_adapter)
    if spec.stack:
        return cast("_Base", _load_stacks(described, code, arguments, base))
    # 2) place it, and load the stages
    pipeline = _load_pipeline(described, arguments)
    # 3) turn the model on the meta device into the object that users get
    parts = pipeline.spec.parts or described.parts  # with what every stage holds in this plan
    model = make_sharded(described.meta, pipeline, parts, code, base=base, owns_cluster=arguments.owns_cluster)
    # 4) load the adapter, if the folder holds one
    if arguments.adapter is not None:
        try:
            model.load_adapter(arguments.adapter, arguments.adapter_name, **of_adapter)
        except BaseException:
            pipeline.unload()
            raise
    return cast("_Base", model)


def _load_stacks(decoder: Described, code: ModelCode, arguments: LoadArguments, base: type[_Base]) -> Any:
    """Load both stacks of an encoder-decoder model, each into a pipeline of its own, on the same workers."""
    if arguments.batch_invariant:
        raise UnsupportedOperationError(
            "batch_invariant=True of an encoder-decoder model is not supported: leave it out"
        )
    if arguments.adapter is not None:
        raise UnsupportedOperationError(
            f"{arguments.adapter} holds an adapter of an encoder-decoder model, which is not supported: load {arguments.path!r}"
        )
    encoder = decoder.encoder()
    plans = arguments.plan if isinstance(arguments.plan, tuple) else (arguments.plan, arguments.plan)
    if isinstance(arguments.plan, Plan):
        raise ArgumentError("plan= of an encoder-decoder model: give two, (encoder's, decoder's), or 'even'")
    pipelines: list[Pipeline] = []
    try:
        for described, plan in zip((encoder, decoder), plans, strict=True):
            pipelines.append(_load_pipeline(described, dataclasses.replace(arguments, plan=plan)))
        stacks = [
            Stacked(described.meta, pipeline, pipeline.spec.parts or described.parts, code)
            for described, pipeline in zip((encoder, decoder), pipelines, strict=True)
        ]
        return make_encoder_decoder(*stacks, base=base, owns_cluster=arguments.owns_cluster)
    except BaseException:
        for pipeline in pipelines:
            pipeline.unload()
        raise


def _load_pipeline(described: Described, arguments: LoadArguments) -> Pipeline:
    """Find the plan of a model, load its stages, and watch them if layers are to move by themselves."""
    cluster = arguments.cluster
    assert cluster is not None
    # 1) find the plan: given, kept on disk, or measured and solved
    plan = find_or_fit_plan(described, arguments)
    described = described.holding(plan.held_instead(described.parts.transmission))
    # 2) load the stages
    timeout_s = cluster.timeout_s if arguments.timeout_s is None else arguments.timeout_s
    pipeline = Pipeline(
        cluster,
        described.spec,
        plan,
        objective=arguments.objective,
        max_kv_tokens=arguments.max_kv_tokens,
        timeout_s=timeout_s,
    )
    try:
        with DeviceProgress.of_loading(plan, shown=arguments.progress) as bars:
            pipeline.load(bars.update)
        # 3) watch the pipeline
        policy = RebalancePolicy() if isinstance(arguments.rebalance, str) else arguments.rebalance
        if policy is not None:
            enable_rebalancing(pipeline, described, arguments.workload, policy, is_automatic=True)
    except BaseException:
        pipeline.unload()
        raise
    return pipeline
