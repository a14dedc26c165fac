# SPDX-License-Identifier: MIT
"""Tiny models of transformers with random weights; most axes have different sizes."""

from typing import Any

import pytest
from torch import nn

TOKENS = dict(vocab_size=96, pad_token_id=0, bos_token_id=1, eos_token_id=2)
TEXT = dict(
    **TOKENS,
    **dict(hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4),
    max_position_embeddings=16,
)
GROUPED = dict(TEXT, num_key_value_heads=2, head_dim=8)
LATENT = dict(
    **{**TEXT, "head_dim": 4, "num_key_value_heads": 4, "num_experts_per_tok": 2},
    **dict(q_lora_rank=12, kv_lora_rank=10, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6),
    **dict(
        n_routed_experts=3,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        moe_intermediate_size=24,
    ),
)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {  # the class, and its sizes
    "llama": ("LlamaForCausalLM", GROUPED),
    "phi3": ("Phi3ForCausalLM", GROUPED),
    "deepseek_v3": ("DeepseekV3ForCausalLM", LATENT),
    "gpt2": (
        "GPT2LMHeadModel",
        dict(TOKENS, n_embd=32, n_layer=2, n_head=4, n_positions=16, n_inner=40),
    ),
    "opt": ("OPTForCausalLM", dict(TEXT, ffn_dim=40, word_embed_proj_dim=32)),
    "mamba": ("MambaForCausalLM", dict(TOKENS, hidden_size=32, state_size=4, num_hidden_layers=2)),
    "bert": ("BertForMaskedLM", TEXT),
    "t5": (
        "T5ForConditionalGeneration",
        dict(vocab_size=96, d_model=32, d_kv=8, d_ff=40, num_layers=2, num_heads=4)
        | dict(decoder_start_token_id=0),
    ),
    "modernbert": ("ModernBertForMaskedLM", dict(TEXT, cls_token_id=1, sep_token_id=2)),
}


def make_model(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="transformers has the architectures")
    kind, sizes = ARCHITECTURES[name]
    model = getattr(transformers, kind)
    return model(model.config_class(**sizes))
