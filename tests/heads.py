"""Tiny random models of classes that do not generate: with the head of a task, or without one.

Knows transformers' tables of classes; nothing of what is compared.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from accelerators import on_accelerator
from architectures import default_config
from families import FAMILIES, tiny_config
from lingualinked.model.proving.small_copies import small_copies

TABLES = {
    "feature-extraction": modeling_auto.MODEL_MAPPING_NAMES,
    "text-classification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "token-classification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "question-answering": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
}
HEADS = [(family, task) for family, (kind, _) in FAMILIES.items() for task, table in TABLES.items() if kind in table]
"""Each family with each task that its type has a class for."""
PAD = 0  # of the tiny configurations


def tiny_head(family: str, task: str, folder: Path, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    """Save the tiny model of a family for a task, every parameter random."""
    cls: Any = getattr(transformers, TABLES[task][FAMILIES[family][0]])
    settings = tiny_config(family)
    settings.update({"num_labels": 2 if task == "question-answering" else 3} | config)
    generator = torch.Generator().manual_seed(len(family) + len(task))
    model = cls(settings).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.empty(parameter.shape).normal_(std=0.15, generator=generator)
            parameter.copy_(noise + (parameter if parameter.ndim == 1 else 0))
    model.save_pretrained(folder)
    return folder


def reference_head(folder: Path, task: str, **arguments: Any) -> PreTrainedModel:
    """Load a checkpoint unsharded as a task's class, its parameters cloned: mapped ones are not aligned."""
    config = transformers.AutoConfig.from_pretrained(folder)
    cls: Any = getattr(transformers, TABLES[task][config.model_type])
    model = cls.from_pretrained(folder, **arguments)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return on_accelerator(model.eval())


def padded(side: str) -> dict[str, Tensor]:
    """Make a batch of texts of several lengths, padded on the left or on the right."""
    ids = torch.randint(3, 97, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row, num_missing in ((1, 3), (2, 7)):
        where = slice(0, num_missing) if side == "left" else slice(9 - num_missing, 9)
        ids[row, where] = PAD
        mask[row, where] = 0
    return {"input_ids": ids, "attention_mask": mask}


def labels_for(task: str, problem_type: str | None = None) -> dict[str, Tensor]:
    """Make labels for such a batch."""
    if task == "question-answering":
        return {"start_positions": torch.tensor([1, 4, 0]), "end_positions": torch.tensor([2, 8, 7])}
    if task == "token-classification":
        return {"labels": torch.arange(27).reshape(3, 9) % 3}
    if problem_type == "multi_label_classification":
        return {"labels": torch.eye(3)}
    if problem_type == "regression":
        return {"labels": torch.tensor([0.5, -1.0, 2.0])}
    return {"labels": torch.tensor([0, 2, 1])}


def assert_same(ours: Any, theirs: Any, *, ignored: tuple[str, ...] = ()) -> None:
    """Compare two outputs field by field, bit for bit; KV counts by its presence, and what is ignored does not count."""
    assert type(ours) is type(theirs)
    assert list(ours) == [name for name in theirs if name not in ignored]
    for name, value in theirs.items():
        if name == "past_key_values":
            continue
        pairs = zip(ours[name], value, strict=True) if isinstance(value, tuple) else [(ours[name], value)]
        assert all(torch.equal(mine, other) for mine, other in pairs), name


def classes_of(model_type: str) -> list[tuple[str, str]]:
    """Return the tasks that transformers has a class for, of a model type, and the class."""
    found = {task: table[model_type] for task, table in TABLES.items() if model_type in table}
    return [(task, name if isinstance(name, str) else name[0]) for task, name in found.items()]


def small_head(model_type: str, task: str, class_name: str, folder: Path) -> PreTrainedModel | None:
    """Save a small copy of a type's default configuration as a class, and load it as transformers does; None if that can't run it."""
    cls: Any = getattr(transformers, class_name)
    for number, config in enumerate(itertools.islice(small_copies(default_config(model_type)), 6)):
        config.num_labels = 2 if task == "question-answering" else 3
        config.architectures = [class_name]
        for each in (config, config.get_text_config()):
            each.pad_token_id = PAD
        try:
            model = cls(config if isinstance(config, cls.config_class) else config.get_text_config()).float()
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.empty(parameter.shape).normal_(std=0.05, generator=generator))
            model.save_pretrained(folder / str(number))
            loaded: PreTrainedModel = reference_head(folder / str(number), task)
            run_uncut(loaded, task)
        except Exception:  # noqa: BLE001 - whatever it is, the next copy may do without
            continue
        return loaded
    return None


def run_uncut(model: Any, task: str) -> Any:
    """Call a model with texts padded on both sides, and with labels."""
    with torch.no_grad():
        return model(**padded("right"), **({} if task == "feature-extraction" else labels_for(task)))
