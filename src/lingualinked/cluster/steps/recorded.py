"""What the stages record in a step: what is due from each, and how the parts are joined.

Knows configurations, shapes and the message of a step; no sessions.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from lingualinked.cluster.plans.route import Route
from lingualinked.errors import ProtocolError, WorkerError
from lingualinked.model.cutting.model_parts import OutputShape
from lingualinked.model.spec import ModelSpec
from lingualinked.model.stages.layer_skips import NO_SKIPS, LayerSkips
from lingualinked.planning.planned_stage import PlannedStage
from lingualinked.protocol.steps import Step, StepRecorded
from lingualinked.quantities import count_text

Recorded = dict[str, tuple[Tensor | None, ...]]
"""What the layers of all stages recorded in a step, by what was asked for."""


@dataclasses.dataclass(frozen=True, slots=True)
class RecordedPart:
    """What one stage recorded in a step: its tensors, and for each kind of record which of its items they are.

    And what it captured, by the numbers of the captures.
    """

    layouts: tuple[tuple[bool, ...], ...]
    tensors: tuple[Tensor, ...]
    captured: tuple[int, ...] = ()
    captured_tensors: tuple[Tensor, ...] = ()

    @classmethod
    def of(cls, message: StepRecorded, tensors: tuple[Tensor, ...]) -> RecordedPart:
        """Sort the tensors that came with a message; `join_captured` notices if they are others than it announced."""
        first = max(0, len(tensors) - (1 if message.is_stacked else len(message.captured)))
        recorded, captured = tensors[:first], tensors[first:]
        if message.is_stacked:
            captured = tuple(each.clone() for stack in captured if stack.ndim for each in stack.unbind())
        return cls(message.layouts, recorded, message.captured, captured)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RecordedSizes:
    """The sizes of what a model's layers record, as its configuration says."""

    dtype: torch.dtype
    width: int  # of hidden states
    last_width: int  # of those behind the last layer
    num_heads: int  # 0: the configuration does not say, or layers differ
    num_experts: int | None  # None: the configuration does not say
    has_windows: bool  # whether some layers attend to fewer tokens than there are
    outputs: tuple[OutputShape, ...] = ()  # of layers, if they are of several kinds or not [rows, tokens, width]
    compresses: bool = False  # whether layers attend to summaries of tokens beside the tokens


@functools.lru_cache(maxsize=8)
def recorded_sizes(spec: ModelSpec) -> RecordedSizes:
    """Read the sizes from a model's configuration, whose fields have other names in each family."""
    from lingualinked.model.cutting.architectures import read_config  # imports transformers
    from lingualinked.model.hf_internals.computing import number_of_heads

    config = read_config(spec).get_text_config(decoder=True)
    windows = ("sliding_window", "attention_chunk_size")
    outputs = () if spec.parts is None else tuple(each[0] for each in spec.parts.layer_outputs if each)
    distinct = dict.fromkeys(dataclasses.replace(each, path="layer") for each in outputs if each.is_regular)
    return RecordedSizes(
        dtype=getattr(torch, spec.dtype),
        width=config.hidden_size,
        last_width=getattr(config, "word_embed_proj_dim", config.hidden_size),
        num_heads=number_of_heads(config),
        num_experts=getattr(config, "num_local_experts", getattr(config, "num_experts", None)),
        has_windows=any(getattr(config, name, None) is not None for name in windows),
        outputs=tuple(distinct),
        compresses=any("compressed" in str(kind) for kind in getattr(config, "layer_types", None) or ()),
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DueRecords:
    """What the layers of a model are to record in a step, and the shapes that it has."""

    names: tuple[str, ...]
    hidden_state_indices: tuple[int, ...] | None  # None: all
    sizes: RecordedSizes
    inputs: Tensor  # ids or embeddings, [rows, tokens, ...]
    num_kv_tokens: int  # that each row has with this step, or has room for in a static KV cache
    longest_window: int  # of layers with a window, which may be shorter
    is_autocast: bool  # dtypes are then torch's to choose
    skips: LayerSkips = NO_SKIPS  # whose layers record nothing: indices are those of the others

    @classmethod
    def of(cls, step: Step, spec: ModelSpec, inputs: Tensor, num_tokens: int, max_cache_len: int) -> DueRecords:
        """Return what a step is to record that ends with so many tokens in each row."""
        return cls(
            names=step.records,
            hidden_state_indices=step.hidden_state_indices,
            sizes=recorded_sizes(spec),
            inputs=inputs,
            num_kv_tokens=max_cache_len or num_tokens,
            longest_window=max(max_cache_len, num_tokens),
            is_autocast=any(name.startswith("autocast") for name, _ in step.torch_settings),
            skips=step.skips or NO_SKIPS,
        )

    def join(self, parts: Mapping[int, object], route: Route) -> Recorded:
        """Join what all stages recorded, or raise a WorkerError of a ProtocolError if one sent something else."""
        recorded: dict[str, list[Tensor | None]] = {name: [] for name in self.names}
        for index, planned in enumerate(route.plan.stages):
            start, end = map(self.skips.num_before, (planned.start, planned.end))
            stage = dataclasses.replace(planned, start=start, end=end)
            try:
                items = self._items_of(parts.get(index), stage, is_last=index == len(route.plan.stages) - 1)
            except ProtocolError as error:
                raise WorkerError(stage.device, f"ProtocolError: {error}") from error
            for name in self.names:
                recorded[name] += items[name]
        return {name: tuple(items) for name, items in recorded.items()}

    def _items_of(self, part: object, stage: PlannedStage, *, is_last: bool) -> dict[str, list[Tensor | None]]:
        """Return the items of each kind that a stage recorded, or raise ProtocolError if they can't be that."""
        where = f"what layers [{stage.start}, {stage.end}) recorded in a step"
        if not isinstance(part, RecordedPart) or len(part.layouts) != len(self.names):
            raise ProtocolError(f"{where} is not of the {count_text(len(self.names), 'kind')} that were asked for")
        if sum(map(sum, part.layouts)) != len(part.tensors):
            raise ProtocolError(f"{where} came with {count_text(len(part.tensors), 'tensor')}, and announced others")
        tensors = iter(part.tensors)
        items: dict[str, list[Tensor | None]] = {}
        for name, layout in zip(self.names, part.layouts, strict=True):
            if not self._is_due(name, layout, stage, is_last=is_last):
                raise ProtocolError(f"{where} has other {name} than those that were asked for: {list(layout)}")
            items[name] = [next(tensors) if is_tensor else None for is_tensor in layout]
            for index, tensor in enumerate(items[name], stage.start):
                if tensor is not None and not self._fits(name, tensor, index, stage.end):
                    came = f"{tensor.dtype} {list(tensor.shape)}"
                    raise ProtocolError(
                        f"{where} has {name} of {came}, which a step of {self._describe()} does not have"
                    )
        return items

    def _is_due(self, name: str, layout: tuple[bool, ...], stage: PlannedStage, *, is_last: bool) -> bool:
        """Say whether a stage may record so many items of a kind, and which of them are tensors."""
        if name == "hidden_states":
            indices, selected = range(stage.start, stage.end + is_last), self.hidden_state_indices
            return layout == tuple(selected is None or index in selected for index in indices)
        return all(layout) and len(layout) <= stage.num_layers  # some layers have no attention, or no router

    def _fits(self, name: str, tensor: Tensor, index: int, end: int) -> bool:
        """Say whether a tensor can be the item of this index; behind the span's last layer is that of the model."""
        sizes, (rows, tokens) = self.sizes, self.inputs.shape[:2]
        if not self._has_due_dtype(name, tensor):
            return False
        if name == "hidden_states":
            if tensor.shape == (rows, tokens, sizes.last_width if index == end else sizes.width):
                return True
            return any(tensor.shape == each.sizes(rows, tokens) for each in sizes.outputs)
        if name == "attentions":
            if not sizes.num_heads and tensor.shape[:2] == (rows, tokens) and tensor.ndim == 3:
                return True  # of a model without heads, what stands for attention
            heads = sizes.num_heads or tensor.shape[1:2].numel()
            if tensor.ndim != 4 or tensor.shape[:3] != (rows, heads, tokens):
                return False
            num_kv, most = tensor.shape[3], self.longest_window * (2 if sizes.compresses else 1)
            return num_kv == self.num_kv_tokens or (sizes.has_windows and 0 < num_kv <= most)
        leading = tensor.shape[:-1]
        return leading in ((rows, tokens), (rows * tokens,)) and sizes.num_experts in (None, tensor.shape[-1])

    def _has_due_dtype(self, name: str, tensor: Tensor) -> bool:
        if self.is_autocast:
            return tensor.is_floating_point() and tensor.itemsize > 1
        return tensor.dtype in self._due_dtypes(name)

    def _due_dtypes(self, name: str) -> Iterator[torch.dtype]:
        yield self.sizes.dtype
        if self.inputs.is_floating_point():
            yield self.inputs.dtype
        yield from (getattr(torch, each.dtype) for each in self.sizes.outputs)
        if name != "hidden_states":
            yield torch.float32  # in which some classes compute probabilities

    def _describe(self) -> str:
        rows, tokens = self.inputs.shape[:2]
        return f"{count_text(rows, 'row')} and {count_text(tokens, 'token')} in {self.sizes.dtype}"
