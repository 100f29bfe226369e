"""Finds the parts of a model: its layers, and what runs before and after them, with their bytes.

Works on the meta device, without weights; knows no stages, devices or checkpoints.
"""

from __future__ import annotations

import contextlib
import copy
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedModel

from lingualinked.errors import ArgumentError, CheckpointError, UncuttableModelError
from lingualinked.model.cutting.architectures import find_class, read_config
from lingualinked.model.cutting.extras import picture_cuts
from lingualinked.model.cutting.heads import find_head
from lingualinked.model.cutting.model_parts import ModelParts, OutputShape
from lingualinked.model.cutting.stacks import find_stack_layers, stack_class
from lingualinked.model.cutting.trace import NUM_ROWS, NUM_TOKENS, Flow, trace
from lingualinked.model.hf_internals import building
from lingualinked.quantities import count_text
from lingualinked.transmission import INPUT_IDS, Shortcut, Transmission
from lingualinked.weight_bytes import WeightBytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from lingualinked.model.spec import CustomCode, ModelSpec


_found: dict[tuple[str, str, str, str, bool, CustomCode | None], ModelParts] = {}

_DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "decoder_layers")
"""What configurations call the number of layers; in some, the first is not the length of the list."""

_MOST_SPARE_POSITIONS = 8  # rows of a table of positions that are none: OPT has two


def build_meta(spec: ModelSpec) -> PreTrainedModel:
    """Build the full model on the meta device, in evaluation mode, with all modules and shapes, but without memory."""
    cls: Any = find_class(spec)
    if spec.stack:
        cls = stack_class(cls, spec.stack)
    try:
        return building.build_on_meta(cls, read_config(spec), getattr(torch, spec.dtype), spec.attn_implementation)
    except (ImportError, LookupError, RuntimeError, StrictDataclassError, TypeError, ValueError) as error:
        cause = f"{type(error).__name__}: {error}"
        if spec.attn_implementation is not None:
            raise ArgumentError(
                f"attn_implementation={spec.attn_implementation!r} can't be used with {spec.class_name} here: {cause}"
            ) from error
        raise CheckpointError(f"{spec.class_name} can't be built from its config: {cause}") from error


def find_parts(meta_model: PreTrainedModel, *, holds_towers: bool = True) -> ModelParts:
    """Find the layers of a model on the meta device, what runs before and after them, and what reaches which layer.

    Parts are whole modules: the children of those on the way to the layers.
    """
    # 1) find the layers, and the modules beside the way to them
    path, layers = _find_layers(meta_model)
    beside = dict(_modules_beside(meta_model, path))
    # 2) run the model once without data
    flow, own = _trace(meta_model, path, beside), meta_model.dtype
    # 3) sort the parts: those that run both before and after layers, or between them, are in every stage
    held = {part for part in beside if part in flow.between or (part in flow.before and part in flow.after)}
    held |= {str(part) for kind, part in flow.used_at if kind == "weight" and part not in flow.after}
    held = _with_inputs(held, flow)
    never = {part: beside[part] for part in beside if part not in flow.before | flow.between | flow.after}
    dropped = {} if holds_towers else never
    epilogue = {part: beside[part] for part in beside if part in flow.after - held}
    prologue = {part: beside[part] for part in beside if part not in {*held, *epilogue, *dropped}}
    # 4) count their bytes
    in_prologue, in_epilogue = _own_tensors(prologue), _own_tensors(epilogue)
    tied = building.ties(meta_model)
    in_both = {target for target, source in tied.items() if target in in_epilogue and source in in_prologue}
    elsewhere = (*in_prologue.values(), *in_epilogue.values(), *_own_tensors(dropped).values())
    ends = {id(each) for each in elsewhere}
    inside = {id(each) for each in _all_tensors(layers).values()}
    everywhere = [each for each in _all_tensors(meta_model).values() if id(each) not in ends | inside]
    return ModelParts(
        head=find_head(meta_model),
        layers=path,
        num_layers=len(layers),
        prologue=tuple(prologue),
        epilogue=tuple(epilogue),
        weights=WeightBytes(
            layers=tuple(_num_bytes(_all_tensors(layer).values()) for layer in layers),
            prologue=_num_bytes(in_prologue.values()),
            epilogue=_num_bytes(in_epilogue.values()),
            tied=_num_bytes(in_epilogue[target] for target in in_both),
            everywhere=_num_bytes(everywhere),
        ),
        outputs=tuple(_describe(part, flow.outputs[part], flow, own) for part in prologue if part in flow.outputs),
        layer_outputs=tuple(
            tuple(
                _describe(f"layer {index}", item, flow, own)
                for item, is_used in zip(flow.layers[index], used or (True,), strict=True)
                if is_used and isinstance(item, torch.Tensor)
            )
            for index, used in sorted(flow.items.items())
        ),
        changes_weights=flow.changes_weights,
        transmission=_transmission_of(
            flow,
            prologue,
            tuple(part for part in beside if part in held),
            picture_cuts(meta_model.config, len(layers)) if never and holds_towers else frozenset(),
            _from_ids_alone(meta_model, prologue, flow, tied),
        ),
        dropped=tuple(dropped),
    )


def _trace(model: PreTrainedModel, path: str, beside: Mapping[str, nn.Module]) -> Flow:
    """Trace a model; in another dtype if its own has no kernel on the meta device for what it computes."""
    layers = model.get_submodule(path)
    assert isinstance(layers, nn.ModuleList)
    try:
        return trace(model, layers, beside)
    except Exception as error:
        twin: Any = copy.deepcopy(model)
        twin.to(torch.float32 if model.dtype == torch.bfloat16 else torch.bfloat16)
        with contextlib.suppress(Exception):
            return trace(twin, twin.get_submodule(path), {part: twin.get_submodule(part) for part in beside})
        raise UncuttableModelError(
            type(model).__name__, f"a forward pass without weights failed ({type(error).__name__}: {error})"
        ) from error


def _with_inputs(held: set[str], flow: Flow) -> set[str]:
    """Add the parts whose outputs held parts are called with before the layers."""
    while True:
        more = {
            str(name) for part in held for kind, name in flow.inputs_of.get(part, ()) if kind == "part"
        } & flow.before
        if more <= held:
            return held
        held = held | more


def _from_ids_alone(
    model: PreTrainedModel, prologue: Iterable[str], flow: Flow, tied: Mapping[str, str]
) -> frozenset[str]:
    """Return the parts of the prologue that any stage may hold: they need ids alone, and share no weights.

    Not the embedding of words, in place of which a caller may give embeddings.
    """
    words, shared = model.get_input_embeddings(), {*tied, *tied.values()}
    return frozenset(
        part
        for part in prologue
        if flow.inputs_of.get(part) == {("ids", "")}
        and not any(each is words for each in model.get_submodule(part).modules())
        and not any(name.startswith(f"{part}.") for name in shared)
    )


def _transmission_of(
    flow: Flow,
    prologue: Mapping[str, nn.Module],
    held: tuple[str, ...],
    forbidden_cuts: frozenset[int],
    holdable: frozenset[str],
) -> Transmission:
    """Return what of a pass crosses the boundaries between stages."""
    used = {mark: set(layers) for mark, layers in flow.used_at.items()}
    everywhere = set(range(1, len(flow.items) + 1))
    for part in held:  # every stage calls it, with what it is called with in the first one
        for mark in flow.inputs_of.get(part, ()):
            used.setdefault(mark, set()).update(everywhere)
    shortcuts, forbidden = [], set(forbidden_cuts)
    for (kind, source), layers in sorted(used.items(), key=str):
        if kind == "ids":
            shortcuts.append(Shortcut(name=INPUT_IDS, made_at=0, used_at=tuple(sorted(layers)), token_bytes=8))
        elif kind == "part" and source in prologue:
            output = flow.outputs.get(str(source))
            if output is None:  # several tensors, which must not leave their stage
                forbidden |= set(range(1, max(layers)))
                continue
            weights = _num_bytes(_all_tensors(prologue[str(source)]).values())
            shortcuts.append(
                Shortcut(
                    name=str(source),
                    made_at=0,
                    used_at=tuple(sorted(layers)),
                    token_bytes=-(-output.nbytes // (NUM_ROWS * NUM_TOKENS)),
                    part_bytes=weights if source in holdable else 0,
                )
            )
        elif kind == "layer":
            output = flow.layers[int(source)][0]
            shortcuts.append(
                Shortcut(
                    name=f"layer {source}",
                    made_at=int(source),
                    used_at=tuple(sorted(layers)),
                    token_bytes=-(-output.nbytes // (NUM_ROWS * NUM_TOKENS)),
                )
            )
        elif kind == "inside":
            forbidden |= set(range(int(source) + 1, min(max(layers) + 1, len(flow.items))))
    return Transmission(
        shortcuts=tuple(shortcuts),
        items=tuple(used for _, used in sorted(flow.items.items())),
        forbidden_cuts=tuple(sorted(forbidden)),
        held=held,
    )


def _describe(path: str, output: torch.Tensor, flow: Flow, own: torch.dtype) -> OutputShape:
    """Describe an output of the traced pass, whose numbers of rows and of tokens are those of any step."""
    dtype = own if output.dtype == flow.dtype else output.dtype
    known: dict[int, int | str] = {NUM_ROWS: "rows", NUM_TOKENS: "tokens"}
    sizes = tuple(known.get(size, size) for size in output.shape)
    return OutputShape(path=path, shape=sizes, dtype=str(dtype).removeprefix("torch."))


def parts_of(spec: ModelSpec, meta_model: PreTrainedModel) -> ModelParts:
    """Return the parts of a model that was built from `spec`, which may say them; else they are found once."""
    if spec.parts is not None:
        return spec.parts
    key = (spec.class_name, spec.stack, spec.config_json, spec.dtype, spec.towers, spec.code)
    if key not in _found:
        _found[key] = find_parts(meta_model, holds_towers=spec.towers)
    return _found[key]


def cache_slots(layers: Iterable[nn.Module]) -> frozenset[int]:
    """Return the slots of a KV cache of transformers that layers write to."""
    return frozenset(slot for layer in layers for slot in _slots_in(layer))


def _slots_in(module: nn.Module) -> set[int]:
    """Return the slots of the innermost modules that have one: around two attentions, that of a layer is its place."""
    inside = {slot for child in module.children() for slot in _slots_in(child)}
    own = (getattr(module, name, None) for name in ("layer_idx", "layer_id", "layer_number"))
    return inside or {index for index in own if isinstance(index, int) and index >= 0}


def learned_positions(meta_model: PreTrainedModel) -> int | None:
    """Return how many positions a model has learned embeddings for; None if positions are computed (rotary, ALiBi)."""
    words = meta_model.get_input_embeddings()
    num_positions = getattr(meta_model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if num_positions is None:
        return None
    tables = [module for module in meta_model.modules() if isinstance(module, nn.Embedding) and module is not words]
    if any(0 <= table.num_embeddings - num_positions <= _MOST_SPARE_POSITIONS for table in tables):
        return int(num_positions)
    return None


def _find_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Find the largest module list with as many modules as the decoder has layers, in a model of the text configuration."""
    of_stack = find_stack_layers(model)
    if of_stack is not None:
        return of_stack
    config = model.config.get_text_config(decoder=True)
    owners = (type(config), type(model.config))
    depths = [depth for name in _DEPTHS if isinstance(depth := getattr(config, name, None), int)]
    for depth in depths:
        candidates = [
            (path, module)
            for path, module in model.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == depth and _config_class(model, path) in owners
        ]
        if candidates:
            return max(candidates, key=lambda each: sum(parameter.numel() for parameter in each[1].parameters()))
    raise UncuttableModelError(
        type(model).__name__, f"no module list holds its {count_text(depths[0] if depths else 0, 'decoder layer')}"
    )


def _config_class(model: PreTrainedModel, path: str) -> type:
    """Return the class of the configuration of the innermost model around a module."""
    while path:
        path = path.rpartition(".")[0]
        module = model.get_submodule(path)
        if isinstance(module, PreTrainedModel):
            return type(module.config)
    return type(model.config)


def _modules_beside(model: PreTrainedModel, path: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules with parameters that are children of those on the way to the layers, containers opened."""
    names = path.split(".")
    way = [".".join(names[:length]) for length in range(len(names) + 1)]
    opened = set(way[:-1])
    for name, module in model.named_modules():
        if name in way or name.rpartition(".")[0] not in opened:
            continue
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            opened.add(name)
        elif next(module.parameters(), None) is not None:
            yield name, module


def _all_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters of a module and its persistent buffers, by name; tied ones under each of their names."""
    state = module.state_dict(keep_vars=True)
    return state | dict(module.named_parameters(remove_duplicate=False))


def _own_tensors(modules: Mapping[str, nn.Module]) -> dict[str, torch.Tensor]:
    """Return the parameters and persistent buffers of modules, by full name."""
    return {f"{path}.{name}": each for path, module in modules.items() for name, each in _all_tensors(module).items()}


def _num_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum({id(each): each.nbytes for each in tensors if isinstance(each, torch.Tensor)}.values())
