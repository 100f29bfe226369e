"""Loads one span: chooses its tensors by the loader's renamings, then makes transformers build, rename, fuse and tie.

Knows weight sources and cut classes; no devices and no steps.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lingualinked.errors import CheckpointError
from lingualinked.model.cutting.architectures import read_config
from lingualinked.model.cutting.cut import Boundary, cut_class, prune
from lingualinked.model.cutting.model_parts import ModelParts, check_span
from lingualinked.model.cutting.parts import build_meta, parts_of
from lingualinked.model.hf_internals import building, loading
from lingualinked.model.weight_files.fetching import FetchError
from lingualinked.model.weights.dummy import BlankWeights, DummyWeights
from lingualinked.model.weights.safetensors_file import FileChangedError
from lingualinked.model.weights.weight_sources import CheckpointWeights, LazyTensor, WeightSource
from lingualinked.quantities import count_text

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from transformers import PreTrainedModel

    from lingualinked.model.hf_internals.loading import MappedKey
    from lingualinked.model.spec import ModelSpec

_MAX_NAMES = 5  # in a message


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedSpan:
    """A cut model with its weights, on the CPU, and the facts of the whole model that joining needs."""

    model: PreTrainedModel
    boundary: Boundary  # of its stand-ins
    parts: ModelParts
    tied: Mapping[str, str]  # {target: source}
    num_bytes_read: int  # from files, including headers


def check_weights(spec: ModelSpec, meta_model: PreTrainedModel) -> None:
    """Check from the files' headers alone that a checkpoint is complete and fits a model; raise CheckpointError if not."""
    with contextlib.closing(_open_source(spec, meta_model)) as source:
        _map_weights(meta_model, source.shapes)


def load_span(
    spec: ModelSpec,
    start: int,
    end: int,
    *,
    progress: Callable[[int], None] | None = None,
    open_files: Callable[[ModelSpec], WeightSource] | None = None,
    fallback: Callable[[PreTrainedModel], WeightSource] | None = None,
) -> LoadedSpan:
    """Load layers ``[start, end)`` and what must run before or after them.

    ``progress`` is called in this thread with the bytes of weights loaded so far. ``open_files`` finds or fetches the files
    of a caller on another host; without it they lie here. ``fallback`` makes another source of weights, from the whole
    model on the meta device, for when files can't be read or fetched here or have changed.
    """
    whole = build_meta(spec)
    parts = parts_of(spec, whole)
    check_span(start, end, parts.num_layers)
    try:
        with contextlib.closing(_open_source(spec, whole, open_files)) as source:
            return _load_from(source, whole, parts, spec, start, end, progress)
    except (FileChangedError, FetchError) as error:
        if fallback is None or parts.changes_weights:  # other stages have changed them
            raise
        cause = str(error)
    # Only now, when the error no longer refers to what was loaded. The model was pruned: build it anew.
    whole = build_meta(spec)
    try:
        with contextlib.closing(fallback(whole)) as source:
            return _load_from(source, whole, parts, spec, start, end, progress)
    except CheckpointError as error:
        raise CheckpointError(
            f"{cause}; nor can the weights be fetched from the workers that run the model: {error}"
        ) from error


def _load_from(
    source: WeightSource,
    whole: PreTrainedModel,
    parts: ModelParts,
    spec: ModelSpec,
    start: int,
    end: int,
    progress: Callable[[int], None] | None,
) -> LoadedSpan:
    """Load a span from one source; prunes the whole model, which is on the meta device."""
    dtype: torch.dtype = getattr(torch, spec.dtype)
    num_loaded = 0

    def loaded(num_elements: int) -> None:
        nonlocal num_loaded
        num_loaded += num_elements
        if progress is not None:
            progress(num_loaded * dtype.itemsize)

    # 1) choose the tensors that the span needs, and have them at hand
    tied = building.ties(whole)
    chosen = choose_tensors(whole, parts, source.shapes, start, end)
    source.prepare(chosen.values())
    # 2) make transformers build the cut class and load them
    boundary = Boundary()
    with boundary.answering():  # the loader runs the class's initialisation of what is not in the checkpoint
        model = loading.load_model(
            cut_class(type(whole), parts, start, end, boundary),
            read_config(spec),
            {name: LazyTensor(source, key, loaded) for name, key in chosen.items()},
            dtype=dtype,
            attn_implementation=spec.attn_implementation,
        )
    return LoadedSpan(model=model, boundary=boundary, parts=parts, tied=tied, num_bytes_read=source.num_bytes_read)


def choose_tensors(
    whole: PreTrainedModel, parts: ModelParts, shapes: Mapping[str, tuple[int, ...]], start: int, end: int
) -> dict[str, str]:
    """Return a checkpoint's keys that a span needs, by the name under which to pass them to the loader.

    Prunes the whole model, which is on the meta device; raises CheckpointError if tensors are missing or do not fit it.
    """
    mapped = _map_weights(whole, shapes)
    tied = building.ties(whole)
    prune(whole, parts, start, end, Boundary())
    return _choose_keys(mapped, tied, set(whole.state_dict()))


def _open_source(
    spec: ModelSpec, meta_model: PreTrainedModel, open_files: Callable[[ModelSpec], WeightSource] | None = None
) -> WeightSource:
    if spec.load_format == "safetensors":
        return CheckpointWeights(spec.files) if open_files is None else open_files(spec)
    return (DummyWeights if spec.load_format == "dummy" else BlankWeights)(meta_model, spec.seed)


def _map_weights(meta_model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, MappedKey]:
    """Map a checkpoint's keys to the parameters of a model; raise if tensors are missing or do not fit."""
    name = type(meta_model).__name__
    mapped = loading.map_keys(meta_model, shapes)
    parameters = dict(meta_model.named_parameters(remove_duplicate=False))
    made = {parameter for each in mapped.values() for parameter in each.names}
    for target, source in building.ties(meta_model).items():
        if target in made or source in made:
            made |= {target, source}
    computed = loading.computed_parameters(meta_model)
    missing = [parameter for parameter in parameters if parameter not in made and parameter not in computed]
    if missing:
        raise CheckpointError(
            f"the checkpoint lacks {count_text(len(missing), 'tensor')} that {name} needs ({_list_names(missing)}): "
            "it is incomplete, or of another model, or of a base model without its head"
        )
    unfit = [
        f"{key} {list(shapes[key])} for {parameter} {list(parameters[parameter].shape)}"
        for key, each in mapped.items()
        for parameter in each.names
        if not each.is_converted and parameter in parameters and tuple(parameters[parameter].shape) != shapes[key]
    ]
    if unfit:
        raise CheckpointError(
            f"the shapes of {count_text(len(unfit), 'tensor')} in the checkpoint are not those of {name} with this config "
            f"({_list_names(unfit)}): the weights and config.json are of different models"
        )
    return mapped


def _choose_keys(mapped: Mapping[str, MappedKey], tied: Mapping[str, str], held: set[str]) -> dict[str, str]:
    """Return the keys that a pruned model needs, by the name under which to pass them to the loader."""
    chosen = {key: key for key, each in mapped.items() if not held.isdisjoint(each.names)}
    made = {parameter for key in chosen for parameter in mapped[key].names}
    key_of = {parameter: key for key, each in mapped.items() for parameter in each.names}
    for target, source in tied.items():
        for parameter, partner in ((target, source), (source, target)):
            # The loader ties within the stage; a tied parameter whose partner is on another stage is read under its own name.
            if parameter in held and parameter not in made and partner not in held:
                chosen[parameter] = key_of[partner]
    return chosen


def _list_names(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(names[:_MAX_NAMES]) + more
