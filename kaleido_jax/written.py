"""Between tokens that the decoder wrote and latents that people read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from kaleido_jax import tokens
from kaleido_jax.latents import LatentDocument, LatentError, latent_type
from kaleido_jax.latents import document as documents
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
    vocabulary: Vocabulary, document: LatentDocument, names: Sequence[str], length: int
) -> Int[np.ndarray, "lz"]:
    """Tokens of a document's latents as in training, so that the document alone makes z.

    Where the decoder spelled them in fewer tokens than the vocabulary would, and those do not fit,
    the document has the decoder's own (`own_tokens`); edited latents are spelled anew, and cut if
    they are too long, as in training.

    Raises:
      LatentError or UserError: vokens that this vocabulary does not have.
    """
    own = document.decoding.get("tokens")
    if isinstance(own, list) and len(own) <= length:
        # Documents come from strangers.
        known = all(type(i) is int and 0 < i < vocabulary.size for i in own)
        if known and _written(vocabulary, own, names) == document.latents:
            return tokens.pad(own, length)
    return tokens.pad(vocabulary.encode_latents(document.latents, names, length), length)


def own_tokens(
    vocabulary: Vocabulary,
    ids: Int[np.ndarray, "lz"],
    latents: dict[str, str],
    names: Sequence[str],
) -> list[int] | None:
    """The decoder's tokens of whole, valid latents, if they would be cut when spelled anew."""
    again = vocabulary.encode_latents(latents, names, len(ids))
    if _written(vocabulary, again, names) == latents or len(ids) > documents.MAX_LIST:
        return None
    return [int(i) for i in ids if i != tokens.PAD]


def _written(vocabulary: Vocabulary, ids: Sequence[int], names: Sequence[str]) -> dict[str, str]:
    return {name: s for name, s in vocabulary.decode_latents(ids, names).items() if s}
