"""Qwen-VL and Qwen-VL-Chat, the paper's own models, in their own format.

Their classes are code in the model's repository, written for transformers 4.3x; today's
transformers does not run them. So there are two ways:

- `qwen-vl:MODEL` with the option `trust_remote_code=True`, in an environment of that time;
- `qwen-vl:ANSWERS.jsonl`: raw answers that were collected elsewhere, one JSON object a line,
  {"key": ..., "raw": ...}, repaired here like any other.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from kaleido_jax.annotate import prompts, repair
from kaleido_jax.annotate.describe import NEW_TOKENS
from kaleido_jax.annotate.language import LanguageEngine
from kaleido_jax.annotate.models import ModelSource, device, file_sha256, loading, require
from kaleido_jax.annotate.protocols import Answer, Engine, Example, Result
from kaleido_jax.errors import UserError

_DIALECT = "qwen-vl"


def qwen_vl_engine(
    stage: str,
    argument: str,
    max_new_tokens: int = 0,
    prompt: str = "auto",
    trust_remote_code: bool = False,
) -> Engine:
    """Engine `qwen-vl:MODEL` or `qwen-vl:ANSWERS.jsonl` for text and bbox.

    Args:
      stage, argument, max_new_tokens, prompt: as `describe.hf_engine`.
      trust_remote_code: run the Python code of the model's repository.

    Raises:
      UserError: no model named, a model without leave to run its code, an unreadable file.
    """
    if argument.endswith(".jsonl"):
        return AnswersEngine(stage, argument)
    source = ModelSource.parse("qwen-vl", argument)
    if not trust_remote_code:
        raise UserError(
            f"model {source.name} brings its own Python code; if you trust it, give the option "
            "trust_remote_code=True (it was written for transformers 4.3x), or pass its answers "
            "as qwen-vl:ANSWERS.jsonl"
        )
    tokens = max_new_tokens or NEW_TOKENS[stage]
    load = functools.partial(QwenVl, source, tokens)
    provenance = {
        "engine": "qwen-vl",
        **source.provenance,
        "parameters": {"max_new_tokens": tokens},
    }
    return LanguageEngine(stage, load, _DIALECT, provenance, prompt, batch_size=1)


def query(path: str | Path, words: str) -> str:
    """A question about the picture in a file, as Qwen-VL was trained to read it."""
    return f"<img>{path}</img>{words}"


class QwenVl:
    """The model with its tokenizer, one picture at a time; pictures go through a file.

    Args:
      source: where the model and its code are.
      max_new_tokens: of an answer.

    Raises:
      UserError: the model cannot be loaded.
    """

    def __init__(self, source: ModelSource, max_new_tokens: int):
        require("torch", "transformers")
        from transformers import AutoModelForCausalLM, AutoTokenizer

        how = {"trust_remote_code": True, **source.arguments}
        self._tokens = max_new_tokens
        self._tokenizer = loading(source, AutoTokenizer.from_pretrained, source.name, **how)
        model = loading(source, AutoModelForCausalLM.from_pretrained, source.name, **how)
        self._model = model.to(device()).eval()
        # One name for every picture: it is part of the question, answers must not hang on it.
        self._folder = tempfile.TemporaryDirectory()
        self._path = Path(self._folder.name) / "picture.png"

    def describe(
        self, images: Sequence[UInt8[np.ndarray, "h w 3"]], prompts: Sequence[str], seed: int | None
    ) -> list[Answer]:
        """See protocols.Captioner. Qwen-VL-Chat answers by its own `chat`."""
        return [self._one(*asked, seed) for asked in zip(images, prompts, strict=True)]

    def ground(
        self, images: Sequence[UInt8[np.ndarray, "h w 3"]], seed: int | None
    ) -> list[Answer]:
        """See protocols.Grounder."""
        return [self._one(image, prompts.GROUNDING, seed) for image in images]

    def _one(self, image: np.ndarray, words: str, seed: int | None) -> Answer:
        import torch
        from PIL import Image

        how = {"do_sample": seed is not None, "max_new_tokens": self._tokens}
        devices = range(torch.cuda.device_count()) if device() == "cuda" else []
        with torch.inference_mode(), torch.random.fork_rng(devices):
            Image.fromarray(np.ascontiguousarray(image)).save(self._path)
            if seed is not None:
                torch.manual_seed(seed)
            asked = query(self._path, words)
            if hasattr(self._model, "chat"):
                said, _ = self._model.chat(self._tokenizer, query=asked, history=None, **how)
                return Answer(said)
            inputs = self._tokenizer(asked, return_tensors="pt").to(self._model.device)
            tokens = self._model.generate(**inputs, **how)[0, inputs["input_ids"].shape[1] :]
        raw = self._tokenizer.decode(tokens, skip_special_tokens=False)
        return Answer(raw, truncated=len(tokens) >= self._tokens)


class AnswersEngine:
    """Raw answers of Qwen-VL(-Chat) from a file, by key.

    Args:
      stage: text or bbox.
      path: JSON lines {"key": str, "raw": str}.

    Raises:
      UserError: the file cannot be read (named with the line).
    """

    batch_size = 256

    def __init__(self, stage: str, path: str):
        self.stage, self._path = stage, path
        self._answers: dict[str, str] | None = None
        self.provenance: dict[str, Any] = {
            "engine": "qwen-vl",
            "model": Path(path).name,
            "sha256": file_sha256(path),
            "parameters": {"dialect": _DIALECT},
        }

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_answers": None}

    def setup(self) -> None:
        """Read the answers. Raises UserError naming the line that is none."""
        if self._answers is not None:
            return
        answers: dict[str, str] = {}
        with open(self._path, encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, 1):
                try:
                    item = json.loads(line)
                    key, raw = item["key"], item["raw"]
                    if not isinstance(key, str) or not isinstance(raw, str):
                        raise TypeError("key and raw must be strings")
                except (ValueError, KeyError, TypeError, RecursionError) as error:
                    raise UserError(
                        f'{self._path} line {number}: not {{"key": ..., "raw": ...}}: {error}'
                    ) from error
                answers[key] = raw
        self._answers = answers

    def annotate(self, examples: Sequence[Example], seed: int) -> list[Result]:
        """Answers repaired; `failed` where the file has none for the key."""
        self.setup()
        results = []
        for example in examples:
            raw = self._answers.get(example.key)
            if raw is None:
                issue = f"{Path(self._path).name} has no answer for this key"
                results.append(Result("", "failed", (issue,)))
                continue
            if self.stage == "text":
                asked = prompts.description_prompt(example.caption, example.metadata)
                found = repair.repair_text(raw, asked)
            else:
                found = repair.repair_grounded(raw, _DIALECT, prompt=prompts.GROUNDING)
            results.append(Result(found.latent, found.status, found.issues, raw))
        return results
