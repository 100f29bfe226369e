"""What transformers saves a checkpoint with.

Knows the names of weights on disk; no tensors' places.
"""

from __future__ import annotations

from transformers.core_model_loading import dot_natural_key, revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

__all__ = ["dot_natural_key", "remove_tied_weights_from_state_dict", "revert_weight_conversion"]
