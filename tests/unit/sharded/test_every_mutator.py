"""No method and no attribute of a model or of its parts changes a sharded model without effect.

Each is used on an unsharded model and on its sharded counterpart. The latter refuses by name, at once or in the next call,
or both give the same logits, loss and tokens afterwards, and call the same hooks.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import lingualinked as ll
from lingualinked.cluster.steps.step_in_flight import StepOptions
from lingualinked.cluster.steps.step_reply import HookEvent, StepReply
from lingualinked.cluster.weights.tensor_edits import Changes
from lingualinked.model.cutting.model_parts import ModelParts
from lingualinked.model.cutting.parts import find_parts
from lingualinked.model.hooks.hook_data import HookPoint
from lingualinked.model.hooks.hook_points import HookedPass, ModuleCall
from lingualinked.model.stages.layer_skips import NO_SKIPS, LayerSkips
from lingualinked.protocol.editing import ChangeKind
from lingualinked.protocol.hooking import HookAnswered
from lingualinked.sharded.calling.forward import make_sharded
from lingualinked.sharded.loading.model_code import ModelCode
from lingualinked.worker.hooks.paused_steps import PausedSteps
from lingualinked.worker.steps.step_runner import apply_answer, describe_call
from message_examples import STEP

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]  # thousands of calls, on a machine that may be busy

IDS = torch.tensor([[1, 17, 3, 9]])
TARGETS = ("", "model", "model.layers", "model.layers.0.mlp.up_proj")

hooks_called: Counter[str] = Counter()


class LocalStep:
    """Stands for a step that stops at hooked modules; a thread runs the model, as in a worker."""

    def __init__(self, model: Any, hooks: Any, run: Callable[[], Any]) -> None:
        self._model, self._hooks, self._run = model, hooks, run
        self._steps = PausedSteps()
        self._event: Any = None
        self._output: Any = None
        self.spans = (("a", 0, model.config.num_hidden_layers),)
        self.points = hooks.points()

    def run(self) -> Any:
        try:
            self._hooks.run(self)
        finally:
            thread = self._steps._idle
            assert thread is not None
            thread.end()
        return self._output

    def next_event(self) -> Any:
        if self._event is None:
            self._steps.start_step((0, 0, 0), self._run_model)
        return self._event

    def answer(self, tensors: tuple[Tensor, ...], points: tuple[HookPoint, ...], **changes: Any) -> None:
        self.points = points
        answer = HookAnswered(
            model=0, plan_version=0, stage=0, session=0, number=0, goes_on=True, points=points, **changes
        )
        self._steps.resume_step((0, 0, 0), (answer, tensors))

    def abandon(self) -> None:
        self._steps.abandon_steps(0)

    def _run_model(self, wait: Callable[[], Any]) -> None:
        def pause(call: ModuleCall) -> tuple[HookPoint, ...] | None:
            message, items = describe_call(msgspec.structs.replace(STEP, stage=0), call)
            self._event = HookEvent(message, "a", items)
            answer, tensors = wait()
            apply_answer(answer, tensors, call)
            points: tuple[HookPoint, ...] | None = answer.points
            return points

        with torch.no_grad(), HookedPass(self._model, "model.layers", self._hooks.points(), pause):
            self._output = self._run()
        self._event = StepReply((self._output.logits,), (), 0)


class LocalSession:
    """Stands for a session: runs the unsharded model in this process."""

    max_cache_len = 0
    stepping_thread = None
    num_microbatches = 1
    kv_has_gradients = False

    def __init__(self, model: Any) -> None:
        self.num_rows, self.num_tokens, self.ended = 0, 0, False
        self._model, self._kv = model, DynamicCache(config=model.config)

    @torch.no_grad()
    def step(
        self,
        ids: Tensor,
        mask: Any,
        positions: Any,
        keep: Any,
        options: StepOptions,
    ) -> tuple[Tensor, dict[str, Any]]:
        def run() -> Any:
            return self._model(
                ids,
                attention_mask=mask,
                position_ids=positions,
                logits_to_keep=keep,
                past_key_values=self._kv,
                **{f"output_{name}": True for name in options.records},
            )

        output = run() if options.hooks is None else LocalStep(self._model, options.hooks, run).run()
        self.num_rows, self.num_tokens = ids.shape[0], self.num_tokens + ids.shape[1]
        return output.logits, {name: output[name] for name in options.records}

    def drop_microbatches(self, sizes: Sequence[int]) -> None:
        pass

    def reserve(self, num_tokens: int) -> None:
        pass

    def end(self) -> None:
        self.ended = True


class LocalEdits:
    """Stands for the edits of the workers' tensors."""

    def __init__(self, model: Any) -> None:
        self.skips = NO_SKIPS
        self._model = model
        self._layers = list(model.model.layers)
        self._in_force: dict[str, Changes] = {}

    def skip(self, skips: LayerSkips) -> None:
        self.skips = skips
        content = [nn.Identity() if index in skips.bypassed else layer for index, layer in enumerate(self._layers)]
        self._model.model.layers = nn.ModuleList(
            [layer for index, layer in enumerate(content) if index not in skips.removed]
        )

    def between_steps(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def new_number(self) -> int:
        return 0

    def in_force(self, name: str) -> Changes:
        return self._in_force.get(name, ())

    @torch.no_grad()
    def replace(self, _: ModelParts, changes: dict[str, Changes], __: object) -> None:
        self._in_force |= changes
        for name, (change,) in changes.items():
            assert change.kind is ChangeKind.SET
            (values,) = change.tensors
            flat = self._model.get_parameter_or_buffer(name).detach().view(-1)
            flat[change.first : change.first + len(values)] = values


class LocalPipeline:
    """Stands for a pipeline of workers."""

    independent_rows = 0

    def __init__(self, model: Any) -> None:
        self._model = model
        self.edits = LocalEdits(model)
        self.weights = SimpleNamespace(read=lambda _, name, *__: model.get_parameter_or_buffer(name).detach().clone())
        self.plan = SimpleNamespace(stages=[SimpleNamespace(end=model.config.num_hidden_layers)], devices=("a",))
        self.spec = SimpleNamespace(batch_invariant=False)

    def check_open(self) -> None:
        pass

    def open_batch(self, _sizes: Sequence[int] = (), _max_cache_len: int = 0) -> LocalSession:
        return LocalSession(self._model)


CONFIG = LlamaConfig(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    vocab_size=32,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)


@pytest.fixture(scope="module")
def original() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(copy.deepcopy(CONFIG)).eval()


@functools.cache
def template() -> tuple[Any, ModelParts, ModelCode]:
    """Build what a sharded model is made of, with the facts about its class."""
    with torch.device("meta"):
        meta = LlamaForCausalLM(copy.deepcopy(CONFIG)).eval()
    return meta, find_parts(meta), ModelCode(meta)


class Pair:
    """An unsharded model and its sharded counterpart, whose workers have a model of their own."""

    def __init__(self, original: Any) -> None:
        self.plain = copy.deepcopy(original)
        meta, parts, code = template()
        meta = copy.deepcopy(meta)
        meta.generation_config = copy.deepcopy(original.generation_config)
        self.pipeline: Any = LocalPipeline(copy.deepcopy(original))
        self.sharded: Any = make_sharded(meta, self.pipeline, parts, code, base=ll.ShardedModel, owns_cluster=False)


def observe(model: Any) -> Any:
    """Tell what a model does: logits, loss, a token, the hooks it calls, and what of it asks for gradients."""
    hooks_called.clear()
    try:
        with torch.no_grad():
            output = model(IDS, labels=IDS)
            tokens = model.generate(IDS, max_new_tokens=1, do_sample=False)
        gradients = [value.requires_grad for value in model.parameters()]
        return (
            output.logits.tolist(),
            output.loss.tolist(),
            tokens.tolist(),
            sorted(output),
            dict(hooks_called),
            gradients,
            model.training,
        )
    except ll.LingualinkedError:
        return "refused"
    except Exception as error:  # noqa: BLE001 - both may fail, and neither without a word
        return "failed", type(error).__name__


def hook(*args: Any, **_: Any) -> None:
    hooks_called["called"] += 1


def zeroed(*args: Any, **_: Any) -> Any:
    return torch.zeros(1)


def given(parameter: inspect.Parameter) -> Any:
    """Make up an argument by its name; for one that is not known, what does no harm."""
    return {
        "fn": lambda module: [each.data.zero_() for each in module.parameters(recurse=False)],
        "hook": hook,
        "func": zeroed,
        "mode": True,
        "name": "extra",
        "module": nn.Identity(),
        "modules": [nn.Identity()],
        "new_num_tokens": 40,
        "param": nn.Parameter(torch.zeros(1)),
        "tensor": torch.zeros(1),
        "value": nn.Embedding(32, 16),
        "new_embeddings": nn.Embedding(32, 16),
        "dst_type": torch.float64,
        "device": "cpu",
        "state_dict": {},
        "target": "0",
        "index": 0,
        "key": 0,
        "idx": 0,
        "attn_implementation": "eager",
        "decoder": nn.Identity(),
        "input": torch.zeros(1, 4, 16),
        "tags": "a-tag",
    }.get(parameter.name, 1)


def variants(method: Any) -> Iterator[tuple[list[Any], dict[str, Any]]]:
    """List the arguments to call a method with: what it requires, and each switch the other way round."""
    parameters = list(inspect.signature(method).parameters.values())
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [given(each) for each in parameters if each.default is each.empty and each.kind in kinds]
    yield required, {}
    for each in parameters:
        if isinstance(each.default, bool):
            yield required, {each.name: not each.default}
        elif each.default is None and each.name in ("new_num_tokens", "dst_type"):
            yield required, {each.name: given(each)}


# What reaches beyond the process, or makes another model instead of changing this one.
NOT_CALLED = {
    "compile",
    "from_pretrained",
    "get_compiled_call",
    "push_to_hub",
    "save_pretrained",
    "register_for_auto_class",
    "load_custom_generate",
}


def use(function: Callable[[Any], Any], model: Any) -> str:
    torch.manual_seed(0)  # some draw weights
    try:
        with torch.no_grad():
            function(model)
    except ll.LingualinkedError:
        return "refused"
    except Exception as error:  # noqa: BLE001 - the other may fail as well
        return f"failed with {type(error).__name__}"
    return "done"


class Check:
    """Uses both models in the same way, and compares them afterwards."""

    def __init__(self, original: Any) -> None:
        self._original = original
        self._pair = Pair(original)
        self._known = observe(original)
        assert observe(self._pair.plain) == self._known
        assert observe(self._pair.sharded) == self._known
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[str] = []

    def __call__(self, name: str, function: Callable[[Any], Any]) -> None:
        pair = self._pair
        theirs, ours = use(function, pair.plain), use(function, pair.sharded)
        plain = observe(pair.plain)
        is_changed = theirs != "done" or plain != self._known
        sharded = observe(pair.sharded) if is_changed or ours == "done" else plain
        changes = "changes" if plain != self._known else "does not change"
        if ours == "refused" or sharded == "refused":
            outcome = "refused" if ours == "refused" else "refused at the next call"
            if ours == "refused" and sharded not in ("refused", self._known, plain):
                self.wrong.append(f"{name} is refused, and changes the sharded model")
        elif sharded == plain or (plain[0] == sharded[0] == "failed"):
            outcome = "done as on the unsharded model"
        else:
            outcome = "WRONG"
            self.wrong.append(f"{name}: {theirs}, {changes} the unsharded model, is {ours} on the sharded one")
        self.outcomes[f"{changes} the unsharded model, {outcome}"] += 1
        if is_changed or (ours != "refused" and sharded == "refused"):
            self._pair = Pair(self._original)

    def report(self, record_property: Callable[[str, object], None]) -> None:
        record_property("outcomes", dict(self.outcomes))
        assert not self.wrong, "\n".join(self.wrong)
        assert observe(self._original) == self._known  # nothing has reached the workers' own


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", TARGETS, ids=lambda path: path or "the model")
def test_every_method(original: Any, path: str, record_property: Callable[[str, object], None]) -> None:
    check = Check(original)
    part = original.get_submodule(path)
    for name in dir(type(part)):
        method = getattr(type(part), name, None)
        if name.startswith("__") or name in NOT_CALLED or not callable(method) or inspect.isclass(method):
            continue
        try:
            calls = list(variants(getattr(part, name)))
        except (TypeError, ValueError):
            continue  # no signature: a class or a generic
        for args, kwargs in calls:
            check(
                f"{name}{kwargs or ''}",
                lambda model, name=name, args=args, kwargs=kwargs: getattr(model.get_submodule(path), name)(
                    *args, **kwargs
                ),
            )
    check.report(record_property)
    assert check.outcomes.total() > 75


@pytest.mark.filterwarnings("ignore")
def test_every_narrow_hook(original: Any, record_property: Callable[[str, object], None]) -> None:
    check = Check(original)
    inner = ("", ".self_attn", ".self_attn.q_proj", ".mlp", ".mlp.act_fn", ".input_layernorm")
    paths = ["", "model", "model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"]
    for path in (*paths, *(f"model.layers.1{each}" for each in inner)):
        for wants in ("output", "input", "both"):
            for positions in (None, -1):
                check(
                    f"ll.hook({path!r}, wants={wants!r}, positions={positions})",
                    lambda model, path=path, wants=wants, positions=positions: ll.hook(
                        model.get_submodule(path), lambda *given: given[-1] * 2 + 1, wants=wants, positions=positions
                    ),
                )
    check.report(record_property)
    assert check.outcomes["changes the unsharded model, done as on the unsharded model"] > 35


def another(value: Any) -> Any:
    """Make up another value of the same kind."""
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1
        case nn.Module():
            return nn.Identity()
        case nn.Parameter():
            return nn.Parameter(torch.zeros_like(value))
        case Tensor():
            return torch.zeros_like(value)
        case dict() | set() | list():
            return type(value)()
        case _:
            return zeroed if callable(value) else None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", ["", "model", "model.layers.0.self_attn"], ids=lambda path: path or "the model")
def test_every_attribute(original: Any, path: str, record_property: Callable[[str, object], None]) -> None:
    check = Check(original)
    part = original.get_submodule(path)
    names = {
        *vars(part),
        *vars(part)["_modules"],
        *vars(part)["_parameters"],
        *vars(part)["_buffers"],
        *dir(type(part)),
    }
    for name in sorted(each for each in names if not each.startswith("__")):
        value = another(getattr(part, name, None))
        check(f"setting {name}", lambda model, name=name, value=value: setattr(model.get_submodule(path), name, value))
        check(
            f"setting {name} past the module",
            lambda model, name=name, value=value: vars(model.get_submodule(path)).update({name: value}),
        )
        check(f"deleting {name}", lambda model, name=name: delattr(model.get_submodule(path), name))
    check.report(record_property)
    assert check.outcomes.total() > 250


@pytest.mark.filterwarnings("ignore")
def test_every_field_of_the_config(original: Any, record_property: Callable[[str, object], None]) -> None:
    check = Check(original)
    for name in sorted(vars(original.config)):
        value = another(getattr(original.config, name, None))
        check(f"setting config.{name}", lambda model, name=name, value=value: setattr(model.config, name, value))
    check.report(record_property)
    assert check.outcomes.total() > 25
