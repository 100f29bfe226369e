"""A checkpoint whose architecture is not part of transformers: its code lies beside it.

Knows files; nothing of workers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

CONFIGURATION = """
from transformers import PreTrainedConfig


class OwnConfig(PreTrainedConfig):
    model_type = "own"

    def __init__(self, vocab_size=1024, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, twist=0.5, **kwargs):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.twist = twist
        super().__init__(**kwargs)
"""

LAYER = '''
import torch
from torch import nn
from torch.nn import functional as F


class OwnLayer(nn.Module):
    """Attention with a twist: every head also adds the mean of its values."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx, self.twist = layer_idx, config.twist
        self.num_heads = config.num_attention_heads
        self.norm = nn.LayerNorm(config.hidden_size)
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states, attention_mask=None, past_key_values=None):
        rows, tokens, size = hidden_states.shape
        shape = rows, tokens, self.num_heads, size // self.num_heads
        query, key, value = (each.view(shape).transpose(1, 2) for each in self.qkv(self.norm(hidden_states)).chunk(3, -1))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
        if attention_mask is not None:
            scores = scores + attention_mask[:, :, :, : key.shape[2]]
        mixed = F.softmax(scores, -1) @ value + self.twist * query.tanh()
        return hidden_states + self.out(mixed.transpose(1, 2).reshape(rows, tokens, size))
'''

MODELING = """
import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_own import OwnConfig
from .layers_own import OwnLayer


class OwnPreTrainedModel(PreTrainedModel):
    config_class = OwnConfig
    base_model_prefix = "model"


class OwnModel(OwnPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([OwnLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def set_input_embeddings(self, value):
        self.embed = value

    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, inputs_embeds=None, use_cache=None, **kwargs):
        hidden = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is not False and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        mask = create_causal_mask(
            config=self.config, inputs_embeds=hidden, attention_mask=attention_mask, past_key_values=past_key_values
        )
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=mask, past_key_values=past_key_values)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden), past_key_values=past_key_values)


class OwnForCausalLM(OwnPreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.model = OwnModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, inputs_embeds=None, use_cache=None,
                logits_to_keep=0, **kwargs):
        output = self.model(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=past_key_values,
            inputs_embeds=inputs_embeds, use_cache=use_cache,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, kept, :])
        return CausalLMOutputWithPast(logits=logits, past_key_values=output.past_key_values)
"""

AUTO_MAP = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}


def write_code(folder: Path) -> None:
    """Write the code and a config.json, without weights."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("configuration_own", CONFIGURATION), ("layers_own", LAYER), ("modeling_own", MODELING)):
        (folder / f"{name}.py").write_text(text)
    config = {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": AUTO_MAP, "dtype": "float32"}
    config |= {"attn_implementation": "eager", "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    (folder / "config.json").write_text(json.dumps(config))


def write_checkpoint(folder: Path) -> Any:
    """Write the code and random weights, and return the uncut model that transformers makes of them."""
    write_code(folder)
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    written = (folder / "config.json").read_text()
    model.save_pretrained(folder)
    (folder / "config.json").write_text(written)
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, attn_implementation="eager").eval()
