import torch
from transformers import PreTrainedModel

from families import tiny_config, tiny_model
from lingualinked.model.cutting.cut import AbsentPart, Boundary, ExitLayer, PassThrough, ReplayLayer, cut_class
from lingualinked.model.cutting.parts import find_parts
from lingualinked.model.hf_internals import building


def cut(family: str, start: int, end: int) -> PreTrainedModel:
    cls = type(tiny_model(family, torch.float32))
    config = tiny_config(family)
    parts = find_parts(building.build_on_meta(cls, config, torch.float32, None))
    return building.build_on_meta(cut_class(cls, parts, start, end, Boundary()), config, torch.float32, None)


def test_a_cut_class_passes_for_the_class_it_was_cut_from() -> None:
    model, cls = cut("llama", 1, 2), type(tiny_model("llama", torch.float32))
    assert isinstance(model, cls)
    assert (type(model).__name__, type(model).__qualname__, type(model).__module__) == (
        cls.__name__,
        cls.__qualname__,
        cls.__module__,
    )


def test_stand_ins_have_the_places_of_what_is_held_elsewhere() -> None:
    model = cut("opt-350m", 1, 3).model.decoder
    assert [type(layer).__name__ for layer in model.layers] == [
        "ReplayLayer",
        "OPTDecoderLayer",
        "OPTDecoderLayer",
        "ExitLayer",
    ]
    assert isinstance(model.embed_tokens, AbsentPart)
    assert isinstance(model.embed_positions, AbsentPart)
    assert isinstance(model.project_in, AbsentPart)
    assert isinstance(model.project_out, PassThrough)


def test_layers_keep_their_indices() -> None:
    assert cut("llama", 2, 4).model.layers[2].self_attn.layer_idx == 2


def test_a_whole_span_has_no_stand_ins() -> None:
    stand_ins = (ReplayLayer, ExitLayer, PassThrough, AbsentPart)
    assert not any(isinstance(module, stand_ins) for module in cut("llama-tied", 0, 4).modules())


def test_ties_reach_no_further_than_the_span() -> None:
    assert building.ties(cut("llama-tied", 2, 4)) == building.ties(cut("llama-tied", 0, 2)) == {}
    assert building.ties(cut("llama-tied", 0, 4)) == {"lm_head.weight": "model.embed_tokens.weight"}
