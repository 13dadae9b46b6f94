"""The stage `voken`: 32 visual tokens by any tokenizer of pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kaleido_jax.annotate.protocols import Example, Result, VisualTokenizer, failure
from kaleido_jax.latents import voken


class VokenEngine:
    """A tokenizer as an engine.

    Args:
      load: makes the tokenizer; picklable, called in `setup`.
      provenance: all that decides the tokens.
      batch_size: pictures at once.
    """

    stage = "voken"

    def __init__(
        self, load: Callable[[], VisualTokenizer], provenance: dict[str, Any], batch_size: int = 64
    ):
        self.provenance, self.batch_size, self._load = provenance, batch_size, load
        self._tokenizer: VisualTokenizer | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tokenizer": None}

    def setup(self) -> None:
        """Load the tokenizer. Raises UserError where its files are missing or unfit."""
        if self._tokenizer is None:
            self._tokenizer = self._load()

    def annotate(self, examples: Sequence[Example], seed: int) -> list[Result]:
        """One string of 32 ids each; a batch that fails is tried again one by one."""
        self.setup()
        results: list[Result] = []
        for start in range(0, len(examples), self.batch_size):
            results += self._batch(examples[start : start + self.batch_size])
        return results

    def _batch(self, examples: Sequence[Example]) -> list[Result]:
        try:
            # Pictures of one run share a size; those of a caller that mixes them go one by one.
            if len({example.image.shape for example in examples}) > 1:
                return [result for example in examples for result in self._batch([example])]
            ids = self._tokenizer.encode(np.stack([example.image for example in examples]))
            codes = self._tokenizer.num_codes
            return [Result(voken.write(row.tolist(), codes), "ok") for row in ids]
        except Exception as error:
            if len(examples) == 1:
                return [failure(error)]
            return [result for example in examples for result in self._batch([example])]
