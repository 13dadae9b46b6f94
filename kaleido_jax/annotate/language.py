"""The stages `text` and `bbox`: a vision-language model is asked, its answers are repaired."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from kaleido_jax.annotate import prompts, repair
from kaleido_jax.annotate.protocols import (
    Answer,
    Captioner,
    Example,
    Grounder,
    Result,
    failure,
    seed_of,
)
from kaleido_jax.errors import UserError


class Speaker(Captioner, Grounder, Protocol):
    """A model that does both."""


class LanguageEngine:
    """A vision-language model as an engine.

    Args:
      stage: text or bbox.
      load: makes the model; picklable, called in `setup`.
      dialect: how the model writes boxes, a name of `dialects.DIALECTS`.
      provenance: model and parameters; the prompts' hash is added here.
      style: which prompt of Table 1 descriptions use, one of `prompts.STYLES`.
      batch_size: pictures at once.

    Raises:
      UserError: an unknown style, or no pictures at once.
    """

    def __init__(
        self,
        stage: str,
        load: Callable[[], Speaker],
        dialect: str,
        provenance: dict[str, Any],
        style: str = "auto",
        batch_size: int = 8,
    ):
        if style not in prompts.STYLES:
            raise UserError(f"no prompt {style!r}; there are {', '.join(prompts.STYLES)}")
        if batch_size < 1:
            raise UserError("batch_size must be at least 1")
        self.stage, self.batch_size = stage, batch_size
        self._load, self._dialect, self._style = load, dialect, style
        self._model: Speaker | None = None
        if stage == "text":
            asked, settings = (prompts.CAPTION, prompts.LABEL), {"prompt": style}
        else:
            asked, settings = (grounding_prompt(dialect),), {"dialect": dialect}
        # The batch is among the parameters: padding moves sums in their last digits.
        settings["batch_size"] = batch_size
        self.provenance = {
            **provenance,
            "prompt_sha256": prompts.sha256(*asked),
            "parameters": {**provenance.get("parameters", {}), **settings},
        }

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": None}

    def setup(self) -> None:
        """Load the model. Raises UserError where it is missing or of another kind."""
        if self._model is None:
            self._model = self._load()

    def annotate(self, examples: Sequence[Example], seed: int) -> list[Result]:
        """Greedy answers; one that is worth another try is drawn once more, from the seed."""
        self.setup()
        results: list[Result] = []
        for start in range(0, len(examples), self.batch_size):
            results += self._batch(examples[start : start + self.batch_size], seed)
        return results

    def _batch(self, examples: Sequence[Example], seed: int) -> list[Result]:
        try:
            answers = self._ask(examples, None)
        except Exception as error:  # one bad example must not cost the others their answers
            if len(examples) == 1:
                return [failure(error)]
            return [result for example in examples for result in self._batch([example], seed)]
        return [
            self._result(example, answer, seed)
            for example, answer in zip(examples, answers, strict=True)
        ]

    def _ask(self, examples: Sequence[Example], seed: int | None) -> list[Answer]:
        images = [example.image for example in examples]
        if self.stage == "bbox":
            return self._model.ground(images, seed)
        return self._model.describe(images, [self._prompt(example) for example in examples], seed)

    def _prompt(self, example: Example) -> str:
        return prompts.description_prompt(example.caption, example.metadata, self._style)

    def _result(self, example: Example, answer: Answer, seed: int) -> Result:
        found = self._repair(example, answer)
        if not found.retry:
            return Result(found.latent, found.status, found.issues, answer.raw)
        try:
            again = self._ask([example], seed_of(seed, f"retry {self.stage}", example.key))[0]
        except Exception as error:
            return failure(error)
        second = self._repair(example, again)
        issues = (*found.issues, "asked once more with another seed", *second.issues)
        status = "repaired" if second.status == "ok" else second.status
        return Result(second.latent, status, issues, again.raw)

    def _repair(self, example: Example, answer: Answer) -> repair.Repaired:
        if self.stage == "text":
            return repair.repair_text(answer.raw, self._prompt(example), answer.truncated)
        return repair.repair_grounded(
            answer.raw,
            self._dialect,
            answer.size,
            grounding_prompt(self._dialect),
            answer.truncated,
        )


def grounding_prompt(dialect: str) -> str:
    """What a model that writes boxes in this dialect is asked for a caption with boxes."""
    return prompts.GROUNDING_JSON if dialect in ("qwen2.5-vl", "qwen3-vl") else prompts.GROUNDING
