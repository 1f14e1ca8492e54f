"""The attention "sparsam_sdpa" of Hugging Face transformers: the core's where that can be, else PyTorch's.

    model.set_attn_implementation("sparsam_sdpa")  # after `import sparsam.torch`

`accelerate` does the same where it is faster (`transformers_switch`). Transformers refuses it, as every name
with "sdpa" in it, for models whose attention PyTorch's function does not compute. Imported where
transformers' models are.
"""

from __future__ import annotations

from typing import Any

from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from sparsam.torch.layers.attention import attend
from sparsam.torch.transformers_switch import NAME
from torch import Tensor, nn

__all__ = ["NAME", "attention_forward"]


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As `sdpa_attention_forward` of transformers, which computes what the core does not."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    sees_all = attention_mask is not None or query.shape[2] == 1 or not causal
    special = ("position_bias", "softcap", "output_attentions")
    if dropout == 0 and sees_all and not any(_is_given(kwargs.get(name)) for name in special):
        y = attend(query, key, value, attention_mask, scaling)
        if y is not None:
            return y, None
    found: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
    )
    return found


def _is_given(option: Any) -> bool:
    return option is not None and option is not False


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
