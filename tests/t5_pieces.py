"""T5's vocabulary for tests, from the table of its pieces where that lies beside the project."""

from __future__ import annotations

import functools
import pathlib

import pytest

from kaleido_jax.tokens import T5_PIECES, Vocabulary

TABLE = pathlib.Path(__file__).parents[2] / "shared" / "data" / "t5_vocab.tsv"

needs_table = pytest.mark.skipif(
    not TABLE.exists(), reason="T5's table of pieces is not beside the project"
)


@functools.cache
def model() -> bytes:
    """A SentencePiece model of T5's pieces and scores, as its own file has them.

    Normalisation (NMT's NFKC, as T5's) comes with the shipped model, whose pieces are replaced.
    """
    pb = pytest.importorskip("sentencepiece.sentencepiece_model_pb2", reason="needs protobuf")
    made = pb.ModelProto()
    made.ParseFromString(Vocabulary.default().model)
    del made.pieces[:]
    made.trainer_spec.Clear()
    made.trainer_spec.model_type = pb.TrainerSpec.UNIGRAM
    made.trainer_spec.pad_id, made.trainer_spec.eos_id = 0, 1
    made.trainer_spec.unk_id, made.trainer_spec.bos_id = 2, -1
    rows = TABLE.read_text(encoding="utf-8").splitlines()
    for number, row in enumerate(rows[:T5_PIECES]):
        piece, score = row.split("\t")
        kind = {0: "CONTROL", 1: "CONTROL", 2: "UNKNOWN"}.get(number, "NORMAL")
        kind = getattr(pb.ModelProto.SentencePiece, kind)
        made.pieces.add(piece=piece, score=float(score), type=kind)
    return made.SerializeToString()


@functools.cache
def vocabulary(num_vokens: int = 8192) -> Vocabulary:
    """T5's 32,100 pieces with this many vokens behind them."""
    return Vocabulary(model(), num_vokens)
