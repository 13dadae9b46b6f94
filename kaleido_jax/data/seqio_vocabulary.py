"""The project's vocabulary as seqio knows vocabularies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from kaleido_jax.data.python_calls import python_call
from kaleido_jax.tokens import EOS, PAD, UNK, Vocabulary


class SeqioVocabulary(seqio.Vocabulary):
    """Captions and latents to ids and back, over `kaleido_jax.tokens.Vocabulary`.

    With T5's 32,100 pieces, ids 32100 to 32127 are kept for section tokens and vokens start at
    32128. Text never becomes a section token or a voken: tasks encode latents by name.

    Args:
      vocabulary: what makes the ids.
    """

    def __init__(self, vocabulary: Vocabulary):
        super().__init__()
        self.tokens = vocabulary

    @property
    def bos_id(self) -> int:
        """The decoder starts from padding, as T5's."""
        return PAD

    @property
    def eos_id(self) -> int:
        """End of sequence."""
        return EOS

    @property
    def unk_id(self) -> int:
        """Unknown."""
        return UNK

    @property
    def _base_vocab_size(self) -> int:
        return self.tokens.size

    def _encode(self, s: str) -> Sequence[int]:
        return self.tokens.encode_text(s)

    def _decode(self, ids: Iterable[int]) -> str:
        return self.tokens.decode(list(ids))

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        """int32 [n] of a scalar string."""

        def encode(text: Any) -> np.ndarray:
            # Bytes within a data set, a 0-d array outside of one.
            text = np.asarray(text, object).item().decode("utf-8", "replace")
            return np.array(self.tokens.encode_text(text), np.int32)

        ids = python_call(encode, [s], tf.int32)
        return tf.ensure_shape(ids, [None])

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        """Strings of int32 [..., n]."""

        def decode(values: np.ndarray) -> np.ndarray:
            flat = values.reshape(-1, values.shape[-1])
            texts = [self.tokens.decode(row.tolist()).encode("utf-8") for row in flat]
            return np.array(texts, object).reshape(values.shape[:-1])

        text = python_call(decode, [ids], tf.string)
        return tf.ensure_shape(text, ids.shape[:-1])

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, SeqioVocabulary)
            and self.tokens.fingerprint == other.tokens.fingerprint
        )

    def __hash__(self) -> int:
        return hash(self.tokens.fingerprint)

    def __str__(self) -> str:
        t = self.tokens
        return f"SeqioVocabulary(pieces={t.num_pieces}, vokens={t.num_vokens}, size={t.size})"
