"""SEED's visual tokens (Ge et al. 2023; code Apache-2.0, weights AILab-CVC/seed-tokenizer-2).

224 x 224 bicubic without crop, CLIP's mean and deviation; EVA ViT-g (Blip2VisionModel); a Q-Former
of 32 queries whose self-attention is **causal** (Blip2QFormerModel with a 4-D mask); two linear
layers with tanh between down to 32 numbers; the nearest of 8192 codes by squared distance.

SEED's own code does not run on today's transformers; these classes of BLIP-2 hold its weights.
`seed_quantizer.pt` lacks the frozen ViT, which SEED fetches from LAVIS as `eva_vit_g.pth`: both
files are needed. They are read with weights_only=True: a file with pickled code is refused.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from kaleido_jax.annotate.models import device, file_sha256, require
from kaleido_jax.annotate.visual_tokens import VokenEngine
from kaleido_jax.errors import UserError
from kaleido_jax.latents import voken

QUANTIZER, VISION = "seed_quantizer.pt", "eva_vit_g.pth"
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
_PREFIX = "visual_encoder."

# Names of SEED's tensors -> names in the classes of BLIP-2. What no line matches decodes pictures
# or text, which nobody does here.
_VISION_NAMES = {
    r"cls_token": "embeddings.class_embedding",
    r"pos_embed": "embeddings.position_embedding",
    r"patch_embed\.proj\.(weight|bias)": r"embeddings.patch_embedding.\1",
    r"blocks\.(\d+)\.norm1\.(weight|bias)": r"encoder.layers.\1.layer_norm1.\2",
    r"blocks\.(\d+)\.norm2\.(weight|bias)": r"encoder.layers.\1.layer_norm2.\2",
    r"blocks\.(\d+)\.attn\.qkv\.weight": r"encoder.layers.\1.self_attn.qkv.weight",
    r"blocks\.(\d+)\.attn\.proj\.(weight|bias)": r"encoder.layers.\1.self_attn.projection.\2",
    r"blocks\.(\d+)\.mlp\.(fc[12])\.(weight|bias)": r"encoder.layers.\1.mlp.\2.\3",
}
_QUERY_NAMES = {
    r"Qformer\.bert\.embeddings\.LayerNorm\.(weight|bias)": r"layernorm.\1",
    r"Qformer\.bert\.encoder\.layer\.(\d+)\.(attention|crossattention)\.self\.(query|key|value)"
    r"\.(weight|bias)": r"encoder.layer.\1.\2.attention.\3.\4",
    r"Qformer\.bert\.encoder\.layer\.(\d+)\.(attention|crossattention)\.output\.(dense|LayerNorm)"
    r"\.(weight|bias)": r"encoder.layer.\1.\2.output.\3.\4",
    r"Qformer\.bert\.encoder\.layer\.(\d+)\.(intermediate_query|output_query)\.(dense|LayerNorm)"
    r"\.(weight|bias)": r"encoder.layer.\1.\2.\3.\4",
}

Weights = dict[str, Any]


def seed_engine(stage: str, argument: str, batch_size: int = 32, vision: str = "") -> VokenEngine:
    """Engine `seed:FOLDER` or `seed:seed_quantizer.pt` for voken.

    Args:
      stage, argument: as `make_engine`; the quantiser's file, or the folder that holds it.
      batch_size: pictures at once.
      vision: file of the ViT; "" is eva_vit_g.pth beside the quantiser, where that lacks it.

    Raises:
      UserError: a file is missing.
    """
    if not argument:
        raise UserError(f"engine 'seed' needs the weights: seed:FOLDER with {QUANTIZER}")
    quantizer = Path(argument) / QUANTIZER if Path(argument).is_dir() else Path(argument)
    beside = quantizer.with_name(VISION)
    encoder = Path(vision) if vision else beside if beside.is_file() else None
    provenance = {
        "engine": "seed",
        "model": quantizer.name,
        "sha256": file_sha256(quantizer),
        "vision_sha256": file_sha256(encoder) if encoder else None,
        "parameters": {"batch_size": batch_size},
    }
    load = functools.partial(SeedTokenizer.load, quantizer, encoder)
    return VokenEngine(load, provenance, batch_size)


def read_weights(path: Path) -> Weights:
    """The tensors of a .pt or .pth file by name; what is not a tensor is left out.

    Raises:
      UserError: missing, unreadable, or with pickled code, which is refused unexecuted.
    """
    import torch

    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:  # zip, pickle and torch each have their own
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is refused: not a plain file of tensors ({reason})") from error
    for key in ("model", "state_dict"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict):
        raise UserError(f"{path} is refused: it holds no tensors by name")
    return {name: t for name, t in found.items() if isinstance(t, torch.Tensor)}


class SeedTokenizer:
    """Pictures to SEED's 32 ids.

    Args:
      weights: the quantiser's tensors by SEED's names.
      vision: the ViT's tensors by EVA's names, without prefix.
      vision_heads, query_heads: attention heads of SEED's two networks, which no tensor tells.

    Raises:
      UserError: a tensor is missing or has another shape than the others ask for.
    """

    def __init__(
        self, weights: Weights, vision: Weights, vision_heads: int = 16, query_heads: int = 12
    ):
        import torch

        try:
            self._vision = _vision_model(weights, vision, vision_heads)
            self._queries = weights["query_tokens"].float()
            self._former = _query_model(weights, self._queries, query_heads)
            down = [
                (weights[f"encode_task_layer.{n}.weight"], weights[f"encode_task_layer.{n}.bias"])
                for n in (0, 2)
            ]
            self._codes = weights["quantize.embedding.weight"].float().to(device())
        except KeyError as error:
            raise UserError(f"SEED's weights lack the tensor {error}") from error
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"SEED's weights do not fit together: {reason}") from error
        if self._queries.shape[1] != voken.COUNT:
            raise UserError(f"SEED's weights have {self._queries.shape[1]} queries, not 32")
        self._queries = self._queries.to(device())
        self._down = [(w.float().to(device()), b.float().to(device())) for w, b in down]
        # As an additive mask over (batch, heads, query, key): a query sees itself and those before.
        ones = torch.ones(voken.COUNT, voken.COUNT, dtype=torch.bool, device=device())
        self._seen = ones.tril()[None, None]
        self._side = self._vision.config.image_size

    @classmethod
    def load(cls, quantizer: Path, vision: Path | None) -> SeedTokenizer:
        """From SEED's file and the ViT's. Raises UserError: missing, refused, or not SEED's."""
        require("torch", "transformers")
        weights = read_weights(quantizer)
        inside = {k.removeprefix(_PREFIX): v for k, v in weights.items() if k.startswith(_PREFIX)}
        if not inside and vision is None:
            raise UserError(
                f"{quantizer} lacks the vision encoder; put {VISION} beside it "
                "(LAVIS' EVA ViT-g of BLIP-2)"
            )
        return cls(weights, inside or read_weights(vision))

    @property
    def num_codes(self) -> int:
        """Size of the codebook."""
        return len(self._codes)

    def encode(self, images: UInt8[np.ndarray, "n h w 3"]) -> Int[np.ndarray, "n 32"]:
        """Ids of square pictures."""
        import torch

        with torch.inference_mode():
            rows = self.embed(images).flatten(0, 1)
            distances = (self._codes**2).sum(1) - 2 * rows @ self._codes.T
            return distances.argmin(1).reshape(len(images), voken.COUNT).cpu().numpy()

    def embed(self, images: UInt8[np.ndarray, "n h w 3"]) -> Any:
        """What is quantised: float tensor [n, 32, width of the codes]."""
        import torch

        pixels = torch.stack([prepare(image, self._side) for image in images]).to(device())
        seen = self._vision(pixel_values=pixels).last_hidden_state
        states = self._former(
            query_embeds=self._queries.expand(len(images), -1, -1),
            attention_mask=self._seen.expand(len(images), -1, -1, -1),
            encoder_hidden_states=seen,
        ).last_hidden_state
        (first, first_bias), (last, last_bias) = self._down
        hidden = torch.tanh(torch.nn.functional.linear(states, first, first_bias))
        return torch.nn.functional.linear(hidden, last, last_bias)


def prepare(image: UInt8[np.ndarray, "h w 3"], side: int) -> Any:
    """A picture as SEED sees it: float32 tensor [3, side, side]."""
    import torch
    from PIL import Image

    resized = Image.fromarray(np.ascontiguousarray(image)).resize((side, side), Image.BICUBIC)
    pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (_MEAN, _STD))
    return (pixels - mean) / std


def _vision_model(weights: Weights, vision: Weights, heads: int) -> Any:
    import torch
    from transformers import Blip2VisionConfig, Blip2VisionModel

    patch = vision["patch_embed.proj.weight"]
    positions = vision["pos_embed"].shape[1] - 1
    depth = _depth(vision, r"blocks\.(\d+)\.")
    config = Blip2VisionConfig(
        hidden_size=patch.shape[0],
        intermediate_size=vision["blocks.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=depth,
        num_attention_heads=heads,
        image_size=round(positions**0.5) * patch.shape[-1],
        patch_size=patch.shape[-1],
        layer_norm_eps=1e-6,
    )
    model = Blip2VisionModel(config)
    state = _renamed(vision, _VISION_NAMES)
    for layer in range(depth):
        # BEiT's attention has no bias of its own for keys.
        q, v = (vision[f"blocks.{layer}.attn.{name}_bias"].float() for name in "qv")
        state[f"encoder.layers.{layer}.self_attn.qkv.bias"] = torch.cat([q, torch.zeros_like(q), v])
    # EVA has no norm at its end; SEED's own, with another epsilon, stands there instead.
    for name in ("weight", "bias"):
        state[f"post_layernorm.{name}"] = weights[f"ln_vision.{name}"].float()
    model.load_state_dict(state, strict=True)
    model.post_layernorm.eps = 1e-5
    return model.to(device()).eval()


def _query_model(weights: Weights, queries: Any, heads: int) -> Any:
    from transformers import Blip2QFormerConfig, Blip2QFormerModel

    layer = "Qformer.bert.encoder.layer.0"
    config = Blip2QFormerConfig(
        hidden_size=queries.shape[-1],
        num_hidden_layers=_depth(weights, r"Qformer\.bert\.encoder\.layer\.(\d+)\."),
        num_attention_heads=heads,
        intermediate_size=weights[f"{layer}.intermediate_query.dense.weight"].shape[0],
        encoder_hidden_size=weights[f"{layer}.crossattention.self.key.weight"].shape[1],
        cross_attention_frequency=2,
    )
    model = Blip2QFormerModel(config)
    model.load_state_dict(_renamed(weights, _QUERY_NAMES), strict=True)
    return model.to(device()).eval()


def _renamed(weights: Weights, names: dict[str, str]) -> Weights:
    found = {}
    for name, tensor in weights.items():
        for pattern, ours in names.items():
            match = re.fullmatch(pattern, name)
            if match:
                found[match.expand(ours)] = tensor.float()
    return found


def _depth(weights: Weights, pattern: str) -> int:
    return 1 + max((int(m[1]) for name in weights if (m := re.match(pattern, name))), default=-1)
