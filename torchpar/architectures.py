# SPDX-License-Identifier: MIT
"""The command ``python -m torchpar muon MODEL``, and tiny models of the architectures that it knows.

It prints the optimizer of each parameter. The models are transformers', with random weights.
"""

import argparse
import importlib
from collections.abc import Sequence
from typing import Any

from torch import nn

from torchpar.errors import ConfigError, TorchparError
from torchpar.optim import Muon

# Sizes by their usual names, chosen so that most axes differ.
_TOKENS = dict(vocab_size=96, pad_token_id=0, bos_token_id=1, eos_token_id=2)
_TEXT = dict(
    **_TOKENS,
    **dict(hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4),
    max_position_embeddings=16,
)
_GROUPED = dict(_TEXT, num_key_value_heads=2, head_dim=8)
_EXPERTS = dict(_GROUPED, num_local_experts=3, num_experts_per_tok=2, moe_intermediate_size=24)
_LATENT = dict(
    {**_EXPERTS, "head_dim": 4, "num_key_value_heads": 4},
    **dict(q_lora_rank=12, kv_lora_rank=10, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6),
    **dict(n_routed_experts=3, n_group=1, topk_group=1, first_k_dense_replace=1),
)
_IMAGE = dict(_TEXT, image_size=8, patch_size=4)
_SPEECH = dict(
    _TOKENS,
    **dict(d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=40, decoder_ffn_dim=40),
    **dict(encoder_attention_heads=4, decoder_attention_heads=4, decoder_start_token_id=1),
    **dict(num_mel_bins=10, max_source_positions=8, max_target_positions=8),
)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {  # the class in transformers, and its sizes
    "llama": ("LlamaForCausalLM", _GROUPED),
    "qwen3": ("Qwen3ForCausalLM", _GROUPED),
    "gemma2": ("Gemma2ForCausalLM", _GROUPED),
    "phi3": ("Phi3ForCausalLM", _GROUPED),
    "mixtral": ("MixtralForCausalLM", _EXPERTS),
    "deepseek_v3": ("DeepseekV3ForCausalLM", _LATENT),
    "gpt2": ("GPT2LMHeadModel", dict(_TOKENS, n_embd=32, n_layer=2, n_head=4, n_positions=16, n_inner=40)),
    "mamba": ("MambaForCausalLM", dict(_TOKENS, hidden_size=32, state_size=4, num_hidden_layers=2)),
    "t5": (
        "T5ForConditionalGeneration",
        dict(_TOKENS, d_model=32, d_kv=6, d_ff=40, num_layers=2, num_heads=4),
    ),
    "bert": ("BertForMaskedLM", _TEXT),
    "modernbert": ("ModernBertForMaskedLM", dict(_TEXT, cls_token_id=1, sep_token_id=2)),
    "vit": ("ViTForImageClassification", _IMAGE),
    "clip": ("CLIPModel", dict(text_config=_TEXT, vision_config=_IMAGE, projection_dim=24)),
    "whisper": ("WhisperForConditionalGeneration", _SPEECH),
}


def make_model(name: str) -> nn.Module:
    """Make a tiny model of one of the `ARCHITECTURES`.

    Raises:
        ConfigError: transformers, or the architecture in it, is not there.
    """
    kind, sizes = ARCHITECTURES[name]
    try:
        model = getattr(importlib.import_module("transformers"), kind)
    except (ImportError, AttributeError) as e:
        raise ConfigError(f"{name} needs transformers: {e}; pip install -U transformers") from e
    made: nn.Module = model(model.config_class(**sizes))
    return made


def _call(name: str) -> nn.Module:
    """The model that a function of the user's returns, named ``MODULE:FUNCTION``."""
    module, _, function = name.partition(":")
    expected = "expected MODULE:FUNCTION, a function without arguments that returns a torch.nn.Module"
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as e:
        raise ConfigError(f"{name}: {e}; {expected}") from e
    made = make() if callable(make) else make
    if not isinstance(made, nn.Module):
        raise ConfigError(f"{name} gives a {type(made).__name__}, {expected}")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table of a model; returns the exit status."""
    parser = argparse.ArgumentParser("python -m torchpar muon", description=main.__doc__)
    known = ", ".join(ARCHITECTURES)
    parser.add_argument("model", help=f"MODULE:FUNCTION, which returns a model, or one of {known}")
    name = parser.parse_args(arguments).model
    try:
        if ":" not in name and name not in ARCHITECTURES:
            raise ConfigError(f"no architecture {name!r}, expected MODULE:FUNCTION or one of {known}")
        print(Muon.for_model(_call(name) if ":" in name else make_model(name)))
    except TorchparError as e:
        parser.error(str(e))
    return 0
