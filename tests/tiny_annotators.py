"""Tiny randomly initialised models of the real classes, written to a folder and loaded by path."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_CONTROL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer() -> Any:
    """Bytes and Qwen's control tokens: 267 ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import Qwen2TokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    made = Qwen2TokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token=None
    )
    made.add_special_tokens({"additional_special_tokens": list(_CONTROL)})
    return made


def _token_ids(made: Any) -> dict[str, int]:
    names = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    return {name: made.convert_tokens_to_ids(token) for name, token in names.items()}


def qwen(folder: Path, kind: str = "qwen2_5_vl") -> Path:
    """Qwen2-VL, Qwen2.5-VL or Qwen3-VL, of 32 features, with its processor."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
        Qwen2VLImageProcessorPil,
    )

    made = tokenizer()
    patch = 16 if kind == "qwen3_vl" else 14
    text = {
        "vocab_size": len(made) + 1,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        "eos_token_id": made.eos_token_id,
        "pad_token_id": made.pad_token_id,
        "bos_token_id": None,
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "embed_dim": 32,
        "intermediate_size": 32,
        "num_heads": 4,
        "patch_size": patch,
        "spatial_patch_size": patch,
        "out_hidden_size": 32,
        "fullatt_block_indexes": [1],
        "deepstack_visual_indexes": [0],
        "num_position_embeddings": 16,
        "mlp_ratio": 1,
    }
    if kind == "qwen2_vl":
        vision["hidden_size"] = text["hidden_size"]  # the size of its output there
    config = AutoConfig.for_model(kind, text_config=text, vision_config=vision, **_token_ids(made))
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    model.generation_config.eos_token_id = made.eos_token_id
    model.generation_config.pad_token_id = made.pad_token_id
    model.save_pretrained(folder)
    made.save_pretrained(folder)
    pictures = Qwen2VLImageProcessorPil(
        patch_size=patch,
        size={"shortest_edge": (2 * patch) ** 2, "longest_edge": (6 * patch) ** 2},
    )
    pictures.save_pretrained(folder)
    names = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}
    path = folder / "processor_config.json"
    told = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**told, "processor_class": f"{names[kind]}Processor"}))
    (folder / "chat_template.jinja").write_text(_TEMPLATE)
    return folder
