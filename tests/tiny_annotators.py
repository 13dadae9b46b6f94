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


def sam(folder: Path, kind: str = "sam", side: int = 64) -> Path:
    """SAM or SAM 2 that sees pictures of `side` pixels."""
    import torch
    import transformers

    torch.manual_seed(0)
    if kind == "sam":
        config = transformers.SamConfig(
            vision_config={
                "hidden_size": 16,
                "output_channels": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": side,
                "patch_size": 16,
                "window_size": 2,
                "global_attn_indexes": [0],
                "num_pos_feats": 8,
                "mlp_dim": 16,
            },
            prompt_encoder_config={
                "hidden_size": 16,
                "image_size": side,
                "patch_size": 16,
                "image_embedding_size": side // 16,
            },
            mask_decoder_config={
                "hidden_size": 16,
                "mlp_dim": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "iou_head_hidden_dim": 16,
            },
        )
        model = transformers.SamModel(config)
    else:
        config = transformers.Sam2Config(
            vision_config={
                "backbone_config": {
                    "model_type": "sam2_hiera_det_model",
                    "hidden_size": 8,
                    "num_attention_heads": 1,
                    "image_size": [side, side],
                    "blocks_per_stage": [1, 1, 2, 1],
                    "embed_dim_per_stage": [8, 16, 32, 64],
                    "num_attention_heads_per_stage": [1, 1, 1, 1],
                    "window_size_per_stage": [4, 4, 4, 4],
                    "global_attention_blocks": [3],
                    "window_positional_embedding_background_size": [4, 4],
                },
                "backbone_channel_list": [64, 32, 16, 8],
                "backbone_feature_sizes": [
                    [side // 4, side // 4],
                    [side // 8, side // 8],
                    [side // 16, side // 16],
                ],
                "fpn_hidden_size": 16,
            },
            prompt_encoder_config={"hidden_size": 16, "image_size": side, "patch_size": 16},
            mask_decoder_config={
                "hidden_size": 16,
                "mlp_dim": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "iou_head_hidden_dim": 16,
            },
        )
        model = transformers.Sam2Model(config)
    model.save_pretrained(folder)
    return folder


def backbone(folder: Path, kind: str = "siglip") -> Path:
    """SigLIP (whose classes SigLIP 2 of fixed size has) or DINOv2: 32 pixels, patches of 4."""
    import torch
    import transformers
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    torch.manual_seed(0)
    small = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    if kind == "siglip":
        config = transformers.SiglipConfig(
            text_config={**small, "vocab_size": 8},
            vision_config={**small, "image_size": 32, "patch_size": 4},
        )
        model, processor = transformers.SiglipModel(config), SiglipImageProcessorPil()
    else:
        config = transformers.Dinov2Config(**small, image_size=32, patch_size=4)
        model, processor = transformers.Dinov2Model(config), BitImageProcessorPil()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def seed_weights(width: int = 16, depth: int = 2, hidden: int = 24, layers: int = 2) -> Any:
    """(quantiser's, ViT's) random tensors by SEED's and EVA's names; 28 pixels, 50 codes."""
    import torch

    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Any:
        return torch.randn(shape, generator=generator) * 0.3

    vision = {
        "cls_token": draw(1, 1, width),
        "pos_embed": draw(1, 5, width),
        "patch_embed.proj.weight": draw(width, 3, 14, 14) * 0.1,
        "patch_embed.proj.bias": draw(width),
    }
    for n in range(depth):
        block = f"blocks.{n}"
        for norm in ("norm1", "norm2"):
            vision |= {
                f"{block}.{norm}.weight": 1 + draw(width),
                f"{block}.{norm}.bias": draw(width),
            }
        vision |= {
            f"{block}.attn.q_bias": draw(width),
            f"{block}.attn.v_bias": draw(width),
            f"{block}.attn.qkv.weight": draw(3 * width, width),
            f"{block}.attn.proj.weight": draw(width, width),
            f"{block}.attn.proj.bias": draw(width),
            f"{block}.mlp.fc1.weight": draw(2 * width, width),
            f"{block}.mlp.fc1.bias": draw(2 * width),
            f"{block}.mlp.fc2.weight": draw(width, 2 * width),
            f"{block}.mlp.fc2.bias": draw(width),
        }
    weights = {
        "ln_vision.weight": 1 + draw(width),
        "ln_vision.bias": draw(width),
        "query_tokens": draw(1, 32, hidden),
        "Qformer.bert.embeddings.LayerNorm.weight": 1 + draw(hidden),
        "Qformer.bert.embeddings.LayerNorm.bias": draw(hidden),
        "encode_task_layer.0.weight": draw(hidden, hidden),
        "encode_task_layer.0.bias": draw(hidden),
        "encode_task_layer.2.weight": draw(8, hidden),
        "encode_task_layer.2.bias": draw(8),
        "quantize.embedding.weight": draw(50, 8),
        "decode_task_layer.0.weight": draw(8, 8),  # among those that nobody reads here
    }

    def linear(name: str, out: int, into: int) -> None:
        weights[f"{name}.weight"], weights[f"{name}.bias"] = draw(out, into), draw(out)

    for n in range(layers):
        layer = f"Qformer.bert.encoder.layer.{n}"
        for kind in ("attention", "crossattention")[: 2 - n % 2]:
            seen = hidden if kind == "attention" else width
            linear(f"{layer}.{kind}.self.query", hidden, hidden)
            linear(f"{layer}.{kind}.self.key", hidden, seen)
            linear(f"{layer}.{kind}.self.value", hidden, seen)
            linear(f"{layer}.{kind}.output.dense", hidden, hidden)
            weights[f"{layer}.{kind}.output.LayerNorm.weight"] = 1 + draw(hidden)
            weights[f"{layer}.{kind}.output.LayerNorm.bias"] = draw(hidden)
        linear(f"{layer}.intermediate_query.dense", 2 * hidden, hidden)
        linear(f"{layer}.output_query.dense", hidden, 2 * hidden)
        weights[f"{layer}.output_query.LayerNorm.weight"] = 1 + draw(hidden)
        weights[f"{layer}.output_query.LayerNorm.bias"] = draw(hidden)
    return weights, vision


_REMOTE_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class TinyConfig(LlamaConfig):
    model_type = "tiny_remote"


class TinyModel(LlamaForCausalLM):
    config_class = TinyConfig
{chat}
"""
_CHAT = """
    def chat(self, tokenizer, query, history, **how):
        path = query.split("<img>")[1].split("</img>")[0]
        with open(path, "rb") as file:
            assert file.read(4) == b"\\x89PNG"
        inputs = tokenizer(query, return_tensors="pt")
        tokens = self.generate(**inputs, **how)[0, inputs["input_ids"].shape[1]:]
        return f"{query[-8:]}|{tokenizer.decode(tokens)}", [(query, "")]
"""


def remote_code(folder: Path, chat: bool) -> Path:
    """A model whose class is code in its folder, as Qwen-VL's; with a `chat` of its own or not."""
    import torch
    import transformers

    made = tokenizer()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(made) + 1,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=made.eos_token_id,
        pad_token_id=made.pad_token_id,
        bos_token_id=None,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made.backend_tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    ).save_pretrained(folder)
    (folder / "code_of_model.py").write_text(_REMOTE_CODE.format(chat=_CHAT if chat else ""))
    path = folder / "config.json"
    told = json.loads(path.read_text())
    told["model_type"] = "tiny_remote"
    told["auto_map"] = {
        "AutoConfig": "code_of_model.TinyConfig",
        "AutoModelForCausalLM": "code_of_model.TinyModel",
    }
    path.write_text(json.dumps(told))
    return folder


def teach(folder: Path, image: Any, asked: str, answer: str, steps: int = 120) -> None:
    """Trains the model of `qwen` to give one answer to one question about one picture."""
    import torch
    from PIL import Image

    from kaleido_jax.annotate.describe import HfVisionLanguage
    from kaleido_jax.annotate.models import ModelSource

    held = HfVisionLanguage(ModelSource(str(folder)), "qwen3-vl", 1, "float32", 0)
    model, processor = held._model, held._processor
    content = [{"type": "image", "image": Image.fromarray(image)}, {"type": "text", "text": asked}]
    inputs = processor.apply_chat_template(
        [[{"role": "user", "content": content}]],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    start = inputs["input_ids"].shape[1]
    said = processor.tokenizer(answer + "<|im_end|>", return_tensors="pt")["input_ids"]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], said], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    kinds = inputs["mm_token_type_ids"]
    inputs["mm_token_type_ids"] = torch.cat([kinds, torch.zeros_like(said)], 1)
    labels = inputs["input_ids"].clone()
    labels[:, :start] = -100
    adam = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(steps):
        loss = model(**inputs, labels=labels).loss
        adam.zero_grad()
        loss.backward()
        adam.step()
    model.save_pretrained(folder)
