"""Which class of transformers runs a checkpoint: by the task that is asked for, or the checkpoint's own.

Knows transformers' tables of classes; neither modules nor weights.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from transformers.models.auto import modeling_auto

from lingualinked.errors import ArgumentError, UncuttableModelError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedConfig

GENERATION = "text-generation"
EMBEDDINGS = "feature-extraction"
SEEING = "image-text-to-text"
_CLASSES: Mapping[str, Mapping[str, Any]] = {
    GENERATION: modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    SEEING: modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    EMBEDDINGS: modeling_auto.MODEL_MAPPING_NAMES,
    "text-classification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "token-classification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "question-answering": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
}
_OTHER_NAMES = {"sentiment-analysis": "text-classification", "ner": "token-classification"}
TASKS = (*_CLASSES, *_OTHER_NAMES)
"""The names of tasks, as in ``transformers.pipeline``."""


def class_of_task(config: PreTrainedConfig, task: str | None, causal: str) -> str:
    """Return the class that runs a configuration for a task; without one, the checkpoint's own, if that is of any task.

    ``causal`` is the class that runs it as a causal LM, which is the default.
    """
    model_type = config.model_type
    if config.is_encoder_decoder:
        if task not in (None, GENERATION):
            raise UncuttableModelError(
                model_type, f"task={task!r} of an encoder-decoder model is not supported: leave it out"
            )
        return causal
    if task is None:
        own = (config.architectures or [causal])[0]
        known = {name for classes in _CLASSES.values() for name in _names(classes.get(model_type))}
        return own if own in known else causal
    task = _OTHER_NAMES.get(task, task)
    if task not in _CLASSES:
        raise ArgumentError(f"task={task!r} must be one of {', '.join(map(repr, TASKS))}, or None")
    if task == GENERATION:
        return causal
    names = _names(_CLASSES[task].get(model_type))
    if not names:
        able = [each for each, classes in _CLASSES.items() if model_type in classes]
        raise UncuttableModelError(
            model_type, f"transformers has no class of it for task={task!r}, only for {', '.join(map(repr, able))}"
        )
    return names[0]


def task_of_class(class_name: str) -> str:
    """Return the task that a class is for; of a class that is for several, the one that asks for most.

    What sees pictures generates text, as a causal LM does.
    """
    return _task_of_class().get(class_name, GENERATION)


def is_known_class(class_name: str) -> bool:
    """Whether transformers lists a class for one of the tasks, for a type of model that generates text and is no encoder."""
    return class_name in _known_classes()


@functools.cache
def _known_classes() -> frozenset[str]:
    generating = _CLASSES[GENERATION].keys() | _CLASSES[SEEING].keys()
    types = generating - modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.keys()
    return frozenset(name for classes in _CLASSES.values() for each in types for name in _names(classes.get(each)))


@functools.cache
def _task_of_class() -> dict[str, str]:
    generating = (
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()
    )  # some stand for models without head too
    tasks: dict[str, str] = {name: GENERATION for names in generating for name in _names(names)}
    for task, classes in _CLASSES.items():
        for names in classes.values():
            tasks |= {name: GENERATION if task == SEEING else task for name in _names(names) if name not in tasks}
    return tasks


def _names(names: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names or ())
