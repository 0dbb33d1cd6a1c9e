"""A tiny model of every architecture that people fine-tune, saved as transformers saves it, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tr
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

TEXT = {
    "vocab_size": 96, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
T5 = {"vocab_size": 96, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}


def _text(config: type, model: type, **values: Any) -> Callable[[], PreTrainedModel]:
    return lambda: model(config(**{**TEXT, **values}))


def _llava() -> PreTrainedModel:
    vision = tr.CLIPVisionConfig(**VISION, image_size=8, patch_size=4)
    text = tr.LlamaConfig(**TEXT)
    return tr.LlavaForConditionalGeneration(
        tr.LlavaConfig(vision_config=vision, text_config=text, image_token_index=5)
    )


def _qwen2_5_vl(tied: bool) -> Callable[[], PreTrainedModel]:
    def make() -> PreTrainedModel:
        vision = {
            "depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 16,
            "patch_size": 4, "spatial_merge_size": 2, "window_size": 16, "fullatt_block_indexes": [1],
        }  # fmt: skip
        text = {**TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
        config = tr.Qwen2_5_VLConfig(vision_config=vision, text_config={**text, "tie_word_embeddings": tied})
        config.tie_word_embeddings = tied
        return tr.Qwen2_5_VLForConditionalGeneration(config)

    return make


def _smolvlm() -> PreTrainedModel:
    vision = {**VISION, "image_size": 8, "patch_size": 4}
    text = {**TEXT, "model_type": "llama"}
    config = tr.SmolVLMConfig(vision_config=vision, text_config=text, scale_factor=2, image_token_id=5)
    return tr.SmolVLMForConditionalGeneration(config)


MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
# The name of an architecture: how a model of it is made.
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "Llama": _text(tr.LlamaConfig, tr.LlamaForCausalLM),
    "Llama, tied": _text(tr.LlamaConfig, tr.LlamaForCausalLM, tie_word_embeddings=True),
    "Llama, attention and MLP biases": _text(
        tr.LlamaConfig, tr.LlamaForCausalLM, attention_bias=True, mlp_bias=True
    ),
    "Qwen2, tied": _text(tr.Qwen2Config, tr.Qwen2ForCausalLM, tie_word_embeddings=True),
    "Qwen3": _text(tr.Qwen3Config, tr.Qwen3ForCausalLM),
    "Qwen3, attention biases": _text(tr.Qwen3Config, tr.Qwen3ForCausalLM, attention_bias=True),
    "Gemma": _text(tr.GemmaConfig, tr.GemmaForCausalLM),
    "Gemma 3": _text(tr.Gemma3TextConfig, tr.Gemma3ForCausalLM),
    "Phi": _text(tr.PhiConfig, tr.PhiForCausalLM, num_key_value_heads=2),
    "Phi-3": _text(tr.Phi3Config, tr.Phi3ForCausalLM),
    "GPT-2": lambda: tr.GPT2LMHeadModel(tr.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=96, n_positions=32)),
    "GPT-NeoX": _text(tr.GPTNeoXConfig, tr.GPTNeoXForCausalLM),
    "Mixtral": _text(tr.MixtralConfig, tr.MixtralForCausalLM, num_local_experts=4),
    "Qwen2-MoE": _text(tr.Qwen2MoeConfig, tr.Qwen2MoeForCausalLM, shared_expert_intermediate_size=12, **MOE),
    "Qwen3-MoE": _text(tr.Qwen3MoeConfig, tr.Qwen3MoeForCausalLM, **MOE),
    "LLaVA": _llava,
    "Qwen2.5-VL": _qwen2_5_vl(tied=False),
    "Qwen2.5-VL, tied": _qwen2_5_vl(tied=True),
    "SmolVLM": _smolvlm,
    "T5, tied": lambda: tr.T5ForConditionalGeneration(tr.T5Config(**T5)),
    "T5, untied": lambda: tr.T5ForConditionalGeneration(tr.T5Config(**T5, tie_word_embeddings=False)),
    "Llama, sequence classification": _text(tr.LlamaConfig, tr.LlamaForSequenceClassification, num_labels=3),
    "Llama, value head": _text(tr.LlamaConfig, tr.LlamaForCausalLM),
}  # fmt: skip
VALUE_HEAD = ("v_head.summary.weight", "v_head.summary.bias")


def make_model(name: str, folder: Path, seed: int, dtype: torch.dtype = torch.bfloat16) -> type[PreTrainedModel]:
    """Save a model of `name` in `folder`; returns its class.

    Every floating parameter and buffer is drawn anew: norms and biases start equal in every model, and a lost or
    unmerged one would go unseen.
    """
    torch.manual_seed(seed)
    model = MODELS[name]().to(dtype)
    model.save_pretrained(folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for tensor in tensors.values():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape) * 0.1)
    if name.endswith("value head"):
        tensors |= {key: torch.randn(1, 16)[: 1 if key.endswith("weight") else None].to(dtype) for key in VALUE_HEAD}
        tensors[VALUE_HEAD[1]] = torch.randn(1).to(dtype)
    save_file(tensors, path, {"format": "pt"})
    return type(model)
