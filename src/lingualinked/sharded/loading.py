"""From the arguments of ``from_pretrained`` to a model in service.

Knows the order in which that is done; workers are told by the cluster.
"""

from __future__ import annotations

from typing import TypeVar, cast

from lingualinked.cluster.pipeline import Pipeline
from lingualinked.sharded.describing import LoadArguments, describe
from lingualinked.sharded.face import wear_face
from lingualinked.sharded.model_code import ModelCode
from lingualinked.sharded.placing import place
from lingualinked.sharded.progress import DeviceProgress
from lingualinked.sharded.rebalancing import decide_from_profile

_Base = TypeVar("_Base")


def load(arguments: LoadArguments, base: type[_Base]) -> _Base:
    """Load a checkpoint into the workers of a cluster; the model is an instance of ``base`` too.

    Raises
    ------
    LingualinkedError
        As `ShardedModel.from_pretrained` says.
    """
    cluster = arguments.cluster
    assert cluster is not None
    described = describe(arguments)
    code = ModelCode(described.meta)
    plan = place(described, arguments)
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
        if arguments.policy is not None:
            decide_from_profile(pipeline, described, arguments.workload, arguments.policy, is_automatic=True)
    except BaseException:
        pipeline.unload()
        raise
    model = wear_face(described.meta, pipeline, described.parts, code, base=base, owns_cluster=arguments.owns_cluster)
    return cast("_Base", model)
