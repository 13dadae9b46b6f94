"""Vision-language models of transformers: Qwen2-VL, Qwen2.5-VL, Qwen3-VL."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from kaleido_jax.annotate.language import LanguageEngine, grounding_prompt
from kaleido_jax.annotate.models import ModelSource, device, loading, require
from kaleido_jax.annotate.protocols import Answer
from kaleido_jax.errors import UserError

# model_type of a config, or how a hub name spells it -> dialect.
_TYPES = {"qwen2_vl": "qwen2-vl", "qwen2_5_vl": "qwen2.5-vl", "qwen3_vl": "qwen3-vl"}
_NAMES = {
    r"qwen2\.5-?vl": "qwen2.5-vl",
    r"qwen2-?vl": "qwen2-vl",
    r"qwen3(?:\.\d)?-?(?:vl|omni)?": "qwen3-vl",
}
_JSON = ("qwen2-vl", "qwen2.5-vl", "qwen3-vl")
NEW_TOKENS = {"text": 256, "bbox": 768}


def dialect_of(source: ModelSource, dialect: str = "") -> str:
    """How a model writes boxes: as told, else by its config's type, else by its name.

    Raises:
      UserError: an unknown dialect, or a model that does not tell.
    """
    if dialect:
        if dialect not in _JSON:
            raise UserError(f"no dialect {dialect!r} of boxes; there are {', '.join(_JSON)}")
        return dialect
    kind = source.model_type()
    if kind is not None:
        for prefix, found in sorted(_TYPES.items(), key=lambda item: -len(item[0])):
            if kind.startswith(prefix):
                return found
    for pattern, found in _NAMES.items():
        if re.search(pattern, source.name.rpartition("/")[2], re.IGNORECASE):
            return found
    raise UserError(
        f"model {source.name} does not tell how it writes boxes; "
        f"give the option dialect, one of {', '.join(_JSON)}"
    )


def hf_engine(
    stage: str,
    argument: str,
    batch_size: int = 8,
    max_new_tokens: int = 0,
    dtype: str = "auto",
    dialect: str = "",
    prompt: str = "auto",
    max_pixels: int = 0,
) -> LanguageEngine:
    """Engine `hf:MODEL` for text and bbox.

    Args:
      stage, argument: as `make_engine`; a hub name, with @REVISION if wanted, or a folder.
      batch_size: pictures at once.
      max_new_tokens: of an answer; 0 is 256 for text and 768 for bbox.
      dtype: a torch dtype's name, or auto: as stored on a GPU, float32 on a CPU.
      dialect: how the model writes boxes; "" finds out by config or name.
      prompt: auto, caption or label (prompts.description_prompt).
      max_pixels: limit of the picture after the processor's resize; 0 is the model's own.

    Raises:
      UserError: no model named, an unknown dialect or prompt.
    """
    source = ModelSource.parse("hf", argument)
    # A description needs no dialect, and any image-text-to-text model can give one.
    spoken = dialect_of(source, dialect) if stage == "bbox" else "qwen3-vl"
    tokens = max_new_tokens or NEW_TOKENS[stage]
    load = functools.partial(HfVisionLanguage, source, spoken, tokens, dtype, max_pixels)
    provenance = {
        "engine": "hf",
        **source.provenance,
        "parameters": {"max_new_tokens": tokens, "dtype": dtype, "max_pixels": max_pixels},
    }
    return LanguageEngine(stage, load, spoken, provenance, prompt, batch_size)


class HfVisionLanguage:
    """A model behind AutoModelForImageTextToText, asked through its chat template.

    Args:
      source, dialect, max_new_tokens, dtype, max_pixels: as `hf_engine`.

    Raises:
      UserError: the model cannot be loaded, or has no chat template.
    """

    def __init__(
        self, source: ModelSource, dialect: str, max_new_tokens: int, dtype: str, max_pixels: int
    ):
        require("torch", "transformers")
        import torch
        from transformers import AutoModelForImageTextToText

        self._dialect, self._tokens = dialect, max_new_tokens
        self._processor = loading(source, _load_processor, source)
        if not getattr(self._processor, "chat_template", None):
            raise UserError(f"model {source.name} has no chat template; it cannot be asked")
        self._processor.tokenizer.padding_side = "left"
        if max_pixels:
            pictures = self._processor.image_processor
            size = dict(pictures.size)
            if "longest_edge" not in size:  # of Qwen's processors, where it is an area
                raise UserError(f"model {source.name} has no limit of pixels that could be set")
            pictures.size = {**size, "longest_edge": max_pixels}
        if dtype == "auto" and device() == "cpu":
            dtype = "float32"
        if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise UserError(f"no dtype {dtype!r}; float32, bfloat16, float16 or auto")
        model = loading(
            source,
            AutoModelForImageTextToText.from_pretrained,
            source.name,
            dtype=dtype,
            **source.arguments,
        )
        self._model = model.to(device()).eval()

    def describe(
        self, images: Sequence[UInt8[np.ndarray, "h w 3"]], prompts: Sequence[str], seed: int | None
    ) -> list[Answer]:
        """See protocols.Captioner."""
        return self._generate(images, prompts, seed)[0]

    def ground(
        self, images: Sequence[UInt8[np.ndarray, "h w 3"]], seed: int | None
    ) -> list[Answer]:
        """See protocols.Grounder."""
        asked = [grounding_prompt(self._dialect)] * len(images)
        answers, inputs = self._generate(images, asked, seed)
        if self._dialect != "qwen2.5-vl":
            return answers
        # Pixels of the picture as the model saw it: its grid of patches tells.
        patch = self._processor.image_processor.patch_size
        sizes = [(int(w) * patch, int(h) * patch) for _, h, w in inputs["image_grid_thw"]]
        return [Answer(a.raw, a.truncated, s) for a, s in zip(answers, sizes, strict=True)]

    def _generate(
        self, images: Sequence[np.ndarray], asked: Sequence[str], seed: int | None
    ) -> tuple[list[Answer], Any]:
        import torch
        from PIL import Image

        conversations = [
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "image": Image.fromarray(np.ascontiguousarray(image))},
                        {"type": "text", "text": words},
                    ],
                }
            ]
            for image, words in zip(images, asked, strict=True)
        ]
        inputs = self._processor.apply_chat_template(
            conversations,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
            processor_kwargs={"padding": True},
        ).to(self._model.device, self._model.dtype)
        how = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        devices = range(torch.cuda.device_count()) if device() == "cuda" else []
        with torch.inference_mode(), torch.random.fork_rng(devices):
            if seed is not None:
                torch.manual_seed(seed)
                how = {"do_sample": True, "temperature": 0.7, "top_p": 0.9}
            tokens = self._model.generate(**inputs, max_new_tokens=self._tokens, **how)
        new = tokens[:, inputs["input_ids"].shape[1] :].tolist()
        return [self._answer(row) for row in new], inputs

    def _answer(self, row: list[int]) -> Answer:
        ends = self._model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends])
        stop = next((i for i, token in enumerate(row) if token in ends), None)
        raw = self._processor.tokenizer.decode(row[:stop], skip_special_tokens=False)
        return Answer(raw, truncated=stop is None)


def _load_processor(source: ModelSource) -> Any:
    from transformers import AutoConfig, AutoProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
    from transformers.utils import is_torchvision_available

    if is_torchvision_available():
        return AutoProcessor.from_pretrained(source.name, **source.arguments)
    # Only videos need torchvision, and none comes here: the processor without that part.
    config = AutoConfig.from_pretrained(source.name, **source.arguments)
    whole = PROCESSOR_MAPPING[type(config)]
    parts = [part for part in whole.get_attributes() if part != "video_processor"]
    pictures = type(whole.__name__, (whole,), {"get_attributes": classmethod(lambda _: parts)})
    return pictures.from_pretrained(source.name, **source.arguments)
