"""Vision-language models served by vLLM: the engine for millions of pictures on GPUs.

vLLM is no dependency: it brings its own torch and wants an environment of its own
(`pip install vllm`). What is sent and how answers are read is in `requests`, `resized` and
`read_outputs`, which need none of it.
"""

from __future__ import annotations

import base64
import functools
import importlib
import math
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from jaxtyping import UInt8

from kaleido_jax.annotate.describe import NEW_TOKENS, dialect_of
from kaleido_jax.annotate.language import LanguageEngine, grounding_prompt
from kaleido_jax.annotate.models import ModelSource
from kaleido_jax.annotate.protocols import Answer
from kaleido_jax.errors import UserError

# Qwen2.5-VL sees pictures whose sides are multiples of 28 pixels and whose area is in these bounds.
_FACTOR = 28
_PIXELS = (56 * 56, 28 * 28 * 1280)


def vllm_engine(
    stage: str,
    argument: str,
    batch_size: int = 256,
    max_new_tokens: int = 0,
    dialect: str = "",
    prompt: str = "auto",
    max_model_len: int = 4096,
    tensor_parallel_size: int = 1,
    gpu_memory_utilization: float = 0.9,
) -> LanguageEngine:
    """Engine `vllm:MODEL` for text and bbox.

    Args:
      stage, argument, max_new_tokens, dialect, prompt: as `describe.hf_engine`.
      batch_size: pictures handed over at once; vLLM schedules them itself.
      max_model_len, tensor_parallel_size, gpu_memory_utilization: of vllm.LLM.

    Raises:
      UserError: no model named, an unknown dialect or prompt.
    """
    source = ModelSource.parse("vllm", argument)
    spoken = dialect_of(source, dialect) if stage == "bbox" else "qwen3-vl"
    tokens = max_new_tokens or NEW_TOKENS[stage]
    settings = {
        "max_model_len": max_model_len,
        "tensor_parallel_size": tensor_parallel_size,
        "gpu_memory_utilization": gpu_memory_utilization,
    }
    load = functools.partial(VllmVisionLanguage, source, spoken, tokens, settings)
    provenance = {
        "engine": "vllm",
        **source.provenance,
        "parameters": {"max_new_tokens": tokens, "max_model_len": max_model_len},
    }
    return LanguageEngine(stage, load, spoken, provenance, prompt, batch_size)


class VllmVisionLanguage:
    """A model behind vllm.LLM.

    Args:
      source, dialect, max_new_tokens: as `describe.hf_engine`.
      settings: further arguments of vllm.LLM.

    Raises:
      UserError: vLLM is not installed.
    """

    def __init__(
        self, source: ModelSource, dialect: str, max_new_tokens: int, settings: dict[str, Any]
    ):
        try:
            library = importlib.import_module("vllm")
        except ImportError as error:
            raise UserError(
                f"engine 'vllm' needs vLLM (pip install vllm, on a machine with a GPU): {error}"
            ) from error
        self._dialect, self._tokens = dialect, max_new_tokens
        self._sampling = library.SamplingParams
        if dialect == "qwen2.5-vl":
            # Said aloud, for the size of what the model saw follows from it.
            pixels = {"min_pixels": _PIXELS[0], "max_pixels": _PIXELS[1]}
            settings = {**settings, "mm_processor_kwargs": pixels}
        self._model = library.LLM(
            model=source.name,
            limit_mm_per_prompt={"image": 1},
            seed=0,
            **source.arguments,
            **settings,
        )

    def describe(
        self, images: Sequence[UInt8[np.ndarray, "h w 3"]], prompts: Sequence[str], seed: int | None
    ) -> list[Answer]:
        """See protocols.Captioner."""
        return self._chat(images, prompts, seed)

    def ground(
        self, images: Sequence[UInt8[np.ndarray, "h w 3"]], seed: int | None
    ) -> list[Answer]:
        """See protocols.Grounder."""
        answers = self._chat(images, [grounding_prompt(self._dialect)] * len(images), seed)
        if self._dialect != "qwen2.5-vl":
            return answers
        sizes = [resized(image.shape[1], image.shape[0]) for image in images]
        return [Answer(a.raw, a.truncated, s) for a, s in zip(answers, sizes, strict=True)]

    def _chat(
        self, images: Sequence[np.ndarray], prompts: Sequence[str], seed: int | None
    ) -> list[Answer]:
        sampling = self._sampling(
            max_tokens=self._tokens, skip_special_tokens=False, **sampling_settings(seed)
        )
        outputs = self._model.chat(requests(images, prompts), sampling, use_tqdm=False)
        return read_outputs(outputs)


def sampling_settings(seed: int | None) -> dict[str, Any]:
    """Greedy without a seed, else drawn with it."""
    if seed is None:
        return {"temperature": 0.0}
    return {"temperature": 0.7, "top_p": 0.9, "seed": seed}


def requests(
    images: Sequence[UInt8[np.ndarray, "h w 3"]], prompts: Sequence[str]
) -> list[list[dict[str, Any]]]:
    """One conversation per picture in the form of OpenAI's chat: the picture as PNG, the prompt."""
    conversations = []
    for image, words in zip(images, prompts, strict=True):
        _, data = cv2.imencode(".png", image[..., ::-1])
        address = "data:image/png;base64," + base64.b64encode(data.tobytes()).decode("ascii")
        content = [
            {"type": "image_url", "image_url": {"url": address}},
            {"type": "text", "text": words},
        ]
        conversations.append([{"role": "user", "content": content}])
    return conversations


def read_outputs(outputs: Sequence[Any]) -> list[Answer]:
    """Answers of vllm.RequestOutput objects."""
    answers = []
    for output in outputs:
        said = output.outputs[0]
        answers.append(Answer(said.text, truncated=said.finish_reason == "length"))
    return answers


def resized(width: int, height: int) -> tuple[int, int]:
    """(width, height) in pixels of what Qwen2.5-VL sees of a picture.

    Sides are rounded to multiples of 28; where the area then leaves the bounds, both are scaled
    by one factor and rounded towards the inside.
    """
    sides = [max(_FACTOR, round(side / _FACTOR) * _FACTOR) for side in (width, height)]
    least, most = _PIXELS
    if sides[0] * sides[1] > most:
        shrink = math.sqrt(width * height / most)
        sides = [
            max(_FACTOR, math.floor(side / shrink / _FACTOR) * _FACTOR) for side in (width, height)
        ]
    elif sides[0] * sides[1] < least:
        grow = math.sqrt(least / (width * height))
        sides = [math.ceil(side * grow / _FACTOR) * _FACTOR for side in (width, height)]
    return sides[0], sides[1]
