import torch
from transformers import LlamaForCausalLM

from families import tiny_config
from lingualinked.model.hf_internals import building
from lingualinked.model.weights.dummy import DummyWeights

GOLDEN = [1.0282871, 0.9769946, 0.9868389]


def weights(family: str, seed: int, dtype: torch.dtype = torch.float32) -> DummyWeights:
    return DummyWeights(building.build_on_meta(LlamaForCausalLM, tiny_config(family), dtype, None), seed)


def test_seed_and_name_decide() -> None:
    name, other = "model.layers.1.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight"
    assert torch.equal(weights("llama", 5).read_tensor(name), weights("llama", 5).read_tensor(name))
    assert not torch.equal(weights("llama", 5).read_tensor(name), weights("llama", 6).read_tensor(name))
    assert not torch.equal(weights("llama", 5).read_tensor(name), weights("llama", 5).read_tensor(other))


def test_values_stay_the_same_between_versions_and_machines() -> None:
    values = weights("llama", 0).read_tensor("model.norm.weight")[:3]
    assert torch.allclose(values, torch.tensor(GOLDEN))


def test_matrices_lie_around_zero_and_norms_around_one() -> None:
    source = weights("llama", 0)
    assert abs(source.read_tensor("lm_head.weight").mean()) < 1e-3
    assert abs(source.read_tensor("lm_head.weight").std() - 0.02) < 1e-3
    assert abs(source.read_tensor("model.norm.weight").mean() - 1) < 0.02


def test_values_have_the_models_dtype() -> None:
    assert weights("llama", 0, torch.bfloat16).read_tensor("lm_head.weight").dtype == torch.bfloat16


def test_a_tied_parameter_is_there_once() -> None:
    assert "lm_head.weight" not in weights("llama-tied", 0).shapes
