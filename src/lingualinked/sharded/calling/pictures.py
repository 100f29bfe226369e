"""Further arguments of a call that go to the stages with a step: pictures, and what belongs to their tokens.

Knows transformers' arguments; neither how pictures are encoded nor which stages there are.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lingualinked.cluster.steps.step_extras import StepExtras
from lingualinked.errors import UnsupportedOperationError
from lingualinked.model.cutting.extras import used_arguments
from lingualinked.model.cutting.parts import build_meta
from lingualinked.model.hf_internals.encoding import ENCODED, encoder_arguments, holds_pictures
from lingualinked.model.proving.evidence import is_proven_with_pictures
from lingualinked.sharded.calling.inputs import check_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lingualinked.model.spec import ModelSpec

_REMEDY = "pass pixel_values, which the first stage encodes"


@dataclasses.dataclass(frozen=True, slots=True)
class Pictures:
    """Pictures of a call of ``generate``, which the first stage is to encode before the prompt, for so many copies of a row."""

    arguments: Mapping[str, Any]
    num_copies: int = 1


class PictureGeneration:
    """Mixin that overrides how transformers' ``GenerationMixin`` encodes pictures: the first stage does it, with the prompt."""

    def _prepare_multimodal_encoder_kwargs_for_generation(self, model_kwargs: dict[str, Any]) -> dict[str, Any]:
        """Put pictures aside, with what transformers encodes them by, and take that out of the other arguments."""
        if model_kwargs.get(ENCODED):
            raise UnsupportedOperationError(f"{ENCODED} is not supported by a sharded model: {_REMEDY}")
        names = frozenset().union(*encoder_arguments(self).values())  # type: ignore[arg-type]  # a PreTrainedModel by its real class
        taken = {name: model_kwargs.pop(name) for name in names & model_kwargs.keys()}
        model_kwargs[ENCODED] = Pictures(taken) if holds_pictures(taken) else None
        return model_kwargs

    def _expand_multimodal_outputs(
        self, _input_ids: Tensor, given: Pictures, expand_size: int = 1, **_: Any
    ) -> Pictures:
        """Note how often each row is repeated: the pictures are encoded once."""
        return dataclasses.replace(given, num_copies=given.num_copies * expand_size)


@dataclasses.dataclass(slots=True)
class FurtherArguments:
    """The arguments of a model's forward that may go to the stages with a step: none, if it takes texts alone."""

    spec: ModelSpec
    names: frozenset[str]
    takes_pictures: bool = True  # whether tests have shown that it is exact with pictures

    @classmethod
    def of(cls, meta: PreTrainedModel, spec: ModelSpec) -> FurtherArguments:
        """Return those of a model on the meta device."""
        kinds = meta.input_modalities
        sees_more = any(each != "text" for each in ((kinds,) if isinstance(kinds, str) else kinds))
        names = frozenset(inspect.signature(meta.forward).parameters) if sees_more else frozenset()
        return cls(spec, names, is_proven_with_pictures(meta.config.model_type))

    def take(self, arguments: dict[str, Any], *, has_positions: bool) -> StepExtras | None:
        """Remove them from the arguments of a call; return what goes to which stage, or None if there are none."""
        if not self.names:
            return None
        # 1) pictures, to be encoded before the text or by the forward
        pictures = arguments.pop(ENCODED, None)
        if pictures and not isinstance(pictures, Pictures):
            raise UnsupportedOperationError(f"{ENCODED} is not supported by a sharded model: {_REMEDY}")
        found = {name: value for name, value in arguments.items() if name in self.names and isinstance(value, Tensor)}
        for name in found:
            del arguments[name]
        ahead = {name: value for name, value in pictures.arguments.items() if value is not None} if pictures else {}
        if not self.spec.towers and holds_pictures(found | ahead):
            raise UnsupportedOperationError(
                "pictures for a sharded model that was loaded with towers=False, without what encodes them: load it with "
                "towers=True"
            )
        if not self.takes_pictures and holds_pictures(found | ahead):
            raise UnsupportedOperationError(
                f"pictures for a sharded {self.spec.class_name} are not supported: no test has shown that it is exact with "
                "them, with this version of transformers; its texts are"
            )
        given = {name: check_tensor(name, value) for name, value in (found | ahead).items()}
        if not given:
            return None
        other = next((name for name, value in given.items() if value.is_floating_point()), None)
        if other is not None and not holds_pictures(given):
            raise UnsupportedOperationError(
                f"{other} of a sharded model is not supported: of what is not text, it takes pictures; leave it out"
            )
        # 2) numbers of pixels matter to the first stage alone, others where a pass without pictures touches them
        plain = {name for name, value in given.items() if not value.is_floating_point() and name not in ahead}
        used = self._used(frozenset(plain), has_positions)
        if not holds_pictures(given):
            given = {name: value for name, value in given.items() if name in used or name not in plain}
            if not given:
                return None
        return StepExtras(
            for_all={name: value for name, value in given.items() if name in used},
            for_first={name: value for name, value in given.items() if name not in used},
            picture_copies=pictures.num_copies if pictures else 0,
        )

    def are_unused(self, names: Collection[str]) -> bool:
        """Return whether no stage uses these arguments, in a step that has positions and no pictures."""
        return self.names.issuperset(names) and not self._used(frozenset(names), has_positions=True)

    def _used(self, names: frozenset[str], has_positions: bool) -> frozenset[str]:
        return _used_arguments(self.spec, names, has_positions) if names else names


@functools.lru_cache(maxsize=32)
def _used_arguments(spec: ModelSpec, names: frozenset[str], has_positions: bool) -> frozenset[str]:
    # Some kernels can't run float32 on the meta device.
    meta = build_meta(dataclasses.replace(spec, dtype="bfloat16"))
    return used_arguments(meta, names, has_positions=has_positions)
