"""Between tokens that the decoder wrote and latents that people read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from kaleido_jax import tokens
from kaleido_jax.latents import LatentError, latent_type
from kaleido_jax.tokens import Vocabulary

# Latents that are a sequence of segments, so that a beginning of them can be valid too.
SEGMENTED = ("bbox", "blob")


def allowed_tokens(
    vocabulary: Vocabulary, names: Sequence[str], size: int
) -> Bool[np.ndarray, "v"]:
    """Tokens that may stand in latents of these names: never pad, unknown or unused rows.

    Args:
      vocabulary: the model's.
      names: latents in order; section tokens are allowed where there are several.
      size: rows of the decoder's embedding.
    """
    allowed = np.zeros(size, bool)
    allowed[tokens.EOS] = True
    if len(names) > 1:
        allowed[[vocabulary.section_id(name) for name in names]] = True
    if "voken" in names:
        allowed[vocabulary.voken_offset :][: vocabulary.num_vokens] = True
    if tuple(names) != ("voken",):
        for token in range(min(vocabulary.num_pieces, size)):
            allowed[token] |= vocabulary.token_text(token) != ""
    return allowed


def read_latents(
    vocabulary: Vocabulary, ids: Int[np.ndarray, "lz"], names: Sequence[str]
) -> tuple[dict[str, str], list[str]]:
    """The latents in a decoded sequence, and what is wrong with them.

    An unfinished or invalid sequence of segments is cut to its longest valid beginning; any
    other latent that its grammar does not hold is left out.

    Returns:
      (valid strings by name in order, latents that are not as they should be with the reason).
      A latent of which nothing was written is simply missing, as in the data.
    """
    finished = bool((ids == tokens.EOS).any())
    problems = [] if finished else ["unfinished"]
    latents = {}
    for name, string in vocabulary.decode_latents(ids, names).items():
        # The tokens may spell the same words with other spaces; the grammars know one spelling.
        string = " ".join(string.split())
        if not string:
            continue
        try:
            latent_type(name).parse(string)
        except LatentError as error:
            problems.append(str(error))
            string = _valid_beginning(name, string)
        if string:
            latents[name] = string
    return latents, problems


def _valid_beginning(name: str, string: str) -> str:
    """The longest beginning that ends with a whole segment and is valid, or ""."""
    if name not in SEGMENTED:
        return ""
    stop = len(string)
    while (stop := string.rfind(")", 0, stop)) >= 0:
        try:
            latent_type(name).parse(string[: stop + 1])
        except LatentError:
            continue
        return string[: stop + 1]
    return ""


def latent_ids(
    vocabulary: Vocabulary, latents: dict[str, str], names: Sequence[str], length: int
) -> Int[np.ndarray, "lz"]:
    """Tokens of a document's latents as in training, so that the document alone makes z.

    Raises:
      LatentError or UserError: vokens that this vocabulary does not have.
    """
    return tokens.pad(vocabulary.encode_latents(latents, names, length), length)


def shorten(
    vocabulary: Vocabulary, latents: dict[str, str], names: Sequence[str], length: int
) -> tuple[dict[str, str], list[str]]:
    """What of whole, valid latents `latent_ids` keeps within `length` tokens, and what is lost.

    The decoder may have spelled a string in fewer tokens than the vocabulary would. A document
    must say what its picture was made from, so it keeps what fits; texts lose words at their end
    and grounded captions segments, as in training.

    Returns:
      (the latents, mostly as they are; a problem for each latent of which nothing is left).
    """
    ids = vocabulary.encode_latents(latents, names, length)
    kept = {name: s for name, s in vocabulary.decode_latents(ids, names).items() if s}
    lost = [name for name in latents if name not in kept]
    return kept, [f"{name} does not fit into {length} tokens" for name in lost]
