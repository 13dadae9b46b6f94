"""One vocabulary for captions and latents: SentencePiece, then section tokens, then vokens.

ids 0..P-1 are the pieces (0 pad, 1 end of sequence, 2 unknown), P..P+27 are kept for section
tokens, voken number k is P + 28 + k. With T5's 32,100 pieces (its 100 sentinels included) vokens
start at 32128; with the shipped model of 1,508 pieces at 1536. User text can never produce pad,
end, section, voken or sentinel ids.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from kaleido_jax.errors import UserError
from kaleido_jax.latents import spelling, voken

PAD, EOS, UNK = 0, 1, 2
SECTION_SLOTS = 28
# Fixed for ever: a checkpoint's embedding rows depend on them.
SECTIONS = {"text": 0, "bbox": 1, "blob": 2, "voken": 3}
T5_PIECES, T5_SENTINELS = 32000, 100
_CHARACTERS_PER_TOKEN = 64
_SENTINEL = re.compile(r"<extra_id_\d+>")


class Vocabulary:
    """Captions and latents to ids and back.

    Attributes:
      num_pieces: P, the text pieces (T5's sentinels included).
      num_vokens: visual tokens known to this vocabulary.
      size: rows of an embedding table, a multiple of 128.
    """

    def __init__(self, model: bytes, num_vokens: int = 0, name: str = "vocabulary"):
        """Args: the bytes of a SentencePiece model; `name` serves error messages.

        Raises:
          UserError: not a SentencePiece model, or other ids for pad, end and unknown than 0, 1, 2.
        """
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except (RuntimeError, TypeError) as error:
            raise UserError(f"{name} is not a SentencePiece model") from error
        p = self._processor
        if (p.pad_id(), p.eos_id(), p.unk_id()) != (PAD, EOS, UNK):
            raise UserError(
                f"{name} has pad, end and unknown at {p.pad_id()}, {p.eos_id()}, {p.unk_id()}; "
                f"they must be {PAD}, {EOS}, {UNK}"
            )
        if num_vokens < 0:
            raise UserError(f"num_vokens is {num_vokens}; it must not be negative")
        self.model = model
        self.num_vokens = num_vokens
        pieces = p.get_piece_size()
        # T5's file holds 32,000 pieces; its 100 sentinels are rows of the model all the same.
        self.num_pieces = pieces + T5_SENTINELS if pieces == T5_PIECES else pieces
        self.section_offset = self.num_pieces
        self.voken_offset = self.num_pieces + SECTION_SLOTS
        self.size = -(-(self.voken_offset + num_vokens) // 128) * 128
        self._reserved = frozenset(
            i
            for i in range(pieces)
            if i <= UNK
            or p.is_control(i)
            or p.is_unused(i)
            or _SENTINEL.fullmatch(p.id_to_piece(i))
        )
        self._known: dict[str, bool] = {" ": True}

    @classmethod
    def from_file(cls, path: str | Path, num_vokens: int = 0) -> Vocabulary:
        """Read a SentencePiece `.model` file; UserError where it is missing or is none."""
        path = Path(path)
        try:
            model = path.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read the vocabulary {path}: {error.strerror}") from error
        return cls(model, num_vokens, str(path))

    @classmethod
    def default(cls, num_vokens: int = 1000) -> Vocabulary:
        """The shipped model of 1,508 pieces (data/train_vocabulary.py)."""
        asset = importlib.resources.files("kaleido_jax") / "assets" / "shapes.model"
        return cls(asset.read_bytes(), num_vokens, "the shipped vocabulary")

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the model's bytes and the count of vokens."""
        return hashlib.sha256(self.model + b"%d" % self.num_vokens).hexdigest()

    def save(self, path: str | Path) -> None:
        """Write the SentencePiece model."""
        Path(path).write_bytes(self.model)

    # ---- text -----------------------------------------------------------------------------

    def encode_text(self, text: str) -> list[int]:
        """Pieces of a text, without an end; unknown characters give UNK."""
        # Lone surrogates cannot be UTF-8, and a zero byte would end SentencePiece's string.
        text = text.encode("utf-8", "replace").decode("utf-8").replace("\0", " ")
        ids = self._processor.encode(text)
        return [UNK if i in self._reserved else i for i in ids]

    def encode_caption(self, text: str, max_length: int | None = None) -> list[int]:
        """Caption to ids ending in EOS, at most `max_length` with it.

        A text of any length costs no more than its first 64 * max_length characters.
        """
        if max_length is None:
            return [*self.encode_text(text), EOS]
        ids = self.encode_text(text[: max_length * _CHARACTERS_PER_TOKEN])
        return [*ids[: max_length - 1], EOS]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids: pad and EOS give nothing, a voken `#k`, a section token nothing."""
        out, run = [], []

        def flush():
            out.append(self._processor.decode(run))
            run.clear()

        for i in map(int, ids):
            if i in (PAD, EOS):
                continue
            if self.is_voken(i):
                flush()
                out.append(f"#{i - self.voken_offset}")
            elif i < self._processor.get_piece_size():
                run.append(i)
            else:
                flush()
        flush()
        return "".join(out)

    def is_byte(self, token: int) -> bool:
        """Whether a piece is one byte of a character that has no piece of its own."""
        return 0 <= token < self._processor.get_piece_size() and self._processor.is_byte(token)

    def token_text(self, token: int) -> str:
        """What one token adds to the text: "" for special tokens, `#k` for a voken."""
        if self.is_voken(token):
            return f"#{token - self.voken_offset}"
        if token in self._reserved or not 0 <= token < self._processor.get_piece_size():
            return ""
        return self._processor.id_to_piece(int(token)).replace("\u2581", " ")

    # ---- latents --------------------------------------------------------------------------

    def section_id(self, name: str) -> int:
        """The token that opens a latent's section; UserError for an unknown latent."""
        if name not in SECTIONS:
            raise UserError(
                f"no section token for latent {name!r} (there are {', '.join(SECTIONS)})"
            )
        return self.section_offset + SECTIONS[name]

    def is_voken(self, token: int) -> bool:
        """Whether an id is a visual token."""
        return self.voken_offset <= token < self.voken_offset + self.num_vokens

    def encode_latents(
        self, values: Mapping[str, str], names: Sequence[str], max_length: int
    ) -> list[int]:
        """Latent strings to ids ending in EOS, at most `max_length` with it.

        One name: its tokens alone. Several: in the order of `names`, each opened by its section
        token; empty ones are left out. What is too long is cut, text first (at a word's end), then
        boxes and blobs (after a whole segment); vokens go whole or not at all. Characters without
        a piece are spelled plainly or left out (latents/spelling.py): UNK never occurs.

        Raises:
          UserError: an unknown name, or vokens that this vocabulary does not have.
          LatentError: vokens that are not 32 ids, or unknown characters in an invalid string.
        """
        for name in names:
            self.section_id(name)
        values = {name: self.spell(name, values[name]) for name in names if values.get(name)}
        parts = {name: self._encode_one(name, values[name]) for name in names if values.get(name)}
        heading = 1 if len(names) > 1 else 0

        def excess() -> int:
            return 1 + sum(heading + len(part) for part in parts.values()) - max_length

        for name in sorted(parts, key=_CUT_ORDER.index):
            over = excess()
            if over <= 0:
                break
            parts[name] = self._cut(name, values[name], max(0, len(parts[name]) - over))
            if not parts[name]:
                del parts[name]
        ids = []
        for name in names:
            if name in parts:
                ids += [self.section_id(name)] if heading else []
                ids += parts[name]
        return [*ids, EOS][:max_length]

    def decode_latents(self, ids: Sequence[int], names: Sequence[str]) -> dict[str, str]:
        """The inverse of `encode_latents`: a string for each name, "" where there is none."""
        ids = [int(i) for i in ids]
        if EOS in ids:
            ids = ids[: ids.index(EOS)]
        if len(names) == 1:
            return {names[0]: self.decode(ids)}
        sections = {self.section_id(name): name for name in names}
        found: dict[str, list[int]] = {name: [] for name in names}
        current = None
        for i in ids:
            if i in sections:
                current = sections[i]
            elif current is not None:
                found[current].append(i)
        return {name: self.decode(part) for name, part in found.items()}

    def knows(self, character: str) -> bool:
        """Whether a character has a piece wherever it stands, and stays what it is."""
        found = self._known.get(character)
        if found is None:
            same = unicodedata.normalize("NFKC", character) == character
            # Read back: SentencePiece's own mark U+2581 is a piece too, but it means a space.
            probe = f"{character} {character}{character}"
            found = same and self.decode(self.encode_text(probe)) == probe
            self._known[character] = found
        return found

    def spell(self, name: str, value: str) -> str:
        """A latent's string as this vocabulary can write it; mostly the string itself.

        Raises:
          LatentError: unknown characters in a string that is not valid.
        """
        if name == "voken" or all(map(self.knows, set(value))):
            return value
        return spelling.spell(name, value, self.knows)

    def _encode_one(self, name: str, value: str) -> list[int]:
        if name != "voken":
            return [i for i in self.encode_text(value) if i != UNK]
        codes = voken.parse(value)
        if max(codes) >= self.num_vokens:
            raise UserError(
                f"voken #{max(codes)} is beyond the vocabulary's {self.num_vokens} vokens"
            )
        return [self.voken_offset + code for code in codes]

    def _cut(self, name: str, value: str, limit: int) -> list[int]:
        """Tokens of the longest beginning of a latent that ends well and fits."""
        if name == "voken" or limit <= 0:
            return []
        ends = _WORD_ENDS if name == "text" else _SEGMENT_ENDS
        value = value[: limit * _CHARACTERS_PER_TOKEN]
        stops = [match.end(1) for match in ends.finditer(value) if match[1]]
        return _longest(lambda k: self._encode_one(name, value[: stops[k]]), len(stops), limit)


_CUT_ORDER = ("text", "bbox", "blob", "voken")
# Group 1 ends where a latent may be cut; doubled parentheses are prose (latents/grounding.py).
_WORD_ENDS = re.compile(r"(\S+)(?=\s|$)")
_SEGMENT_ENDS = re.compile(r"\(\(|\)\)|(\([^()]*\))")


def _longest(encode: Callable[[int], list[int]], count: int, limit: int) -> list[int]:
    """encode(k) for the largest k < count of at most `limit` tokens; lengths grow with k."""
    best: list[int] = []
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        ids = encode(middle)
        if len(ids) <= limit:
            best, low = ids, middle + 1
        else:
            high = middle
    return best


def pad(ids: Sequence[int], length: int) -> np.ndarray:
    """int32 [length] filled up with PAD; ids must not be longer."""
    out = np.zeros(length, np.int32)
    out[: len(ids)] = ids
    return out
