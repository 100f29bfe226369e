"""Loads a model: describes it, places its layers, loads the stages, and makes the object that users get.

Knows the order of these steps; the pipeline talks to the workers.
"""

from __future__ import annotations

from typing import Any, TypeVar, cast

from lingualinked.cluster.pipeline import Pipeline
from lingualinked.control.policy import RebalancePolicy
from lingualinked.sharded.adapters.adapter_files import check_name, open_adapter
from lingualinked.sharded.calling.forward import make_sharded
from lingualinked.sharded.loading.arguments import LoadArguments
from lingualinked.sharded.loading.describing import describe
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
    code = ModelCode(described.meta)
    of_adapter: dict[str, Any] = {}
    if arguments.adapter is not None:
        of_adapter = {name: value for name, value in arguments.hub.items() if name != "token"} | {
            **arguments.adapter_kwargs
        }
        open_adapter(described.spec, check_name(arguments.adapter_name), arguments.adapter, **of_adapter)
    # 2) find the plan: given, kept on disk, or measured and solved
    plan = find_or_fit_plan(described, arguments)
    # 3) load the stages
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
        # 4) watch the pipeline, if layers are to move by themselves
        policy = RebalancePolicy() if isinstance(arguments.rebalance, str) else arguments.rebalance
        if policy is not None:
            enable_rebalancing(pipeline, described, arguments.workload, policy, is_automatic=True)
    except BaseException:
        pipeline.unload()
        raise
    # 5) turn the model on the meta device into the object that users get
    model = make_sharded(
        described.meta, pipeline, described.parts, code, base=base, owns_cluster=arguments.owns_cluster
    )
    # 6) load the adapter, if the folder holds one
    if arguments.adapter is not None:
        try:
            model.load_adapter(arguments.adapter, arguments.adapter_name, **of_adapter)
        except BaseException:
            pipeline.unload()
            raise
    return cast("_Base", model)
