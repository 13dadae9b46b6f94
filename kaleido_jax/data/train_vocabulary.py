"""Train the shipped SentencePiece model: `python -m kaleido_jax.data.train_vocabulary OUT.model`.

1,508 pieces, so that with 28 section tokens text takes 1,536 ids: a piece for every whole number of
0..1000, in which boxes and ellipses are measured, the others by byte-pair merges. One token says
where an edge lies; of digits, each one's weight depends on how many follow. Every ASCII character
has a piece of its own; longer numbers are cut.
Deterministic: the same package version writes the same bytes.
"""

from __future__ import annotations

import io
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

from kaleido_jax.data import shapes, shapes_text

NUM_PIECES = 1508
NUM_SCENES = 6000
# First id and count of the pieces "0" to "1000": pad, end, unknown and ", " come before.
NUMBER_TOKENS = (4, 1001)

_CIFAR = "airplane automobile bird cat deer dog frog horse ship truck"
CIFAR_CLASSES = _CIFAR.split()
_COCO = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,"
    "stop sign,parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,"
    "backpack,umbrella,handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,"
    "baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,knife,spoon,"
    "bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,"
    "potted plant,bed,dining table,toilet,tv,laptop,mouse,remote,keyboard,cell phone,microwave,"
    "oven,toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush"
)
COCO_LABELS = _COCO.split(",")


def sentences() -> Iterator[str]:
    """The training text: what every embedded data set says, in fixed order."""
    for index in range(NUM_SCENES):
        scene = shapes.make_scene(0, index)
        yield shapes_text.caption(scene)
        yield shapes_text.grounded_caption(scene)
        yield shapes_text.blobs(scene)
        if index % 3 == 0:  # long: fewer of them, or they would take all the pieces
            yield shapes_text.description(scene)
    draw = random.Random(0)
    for _ in range(40):
        yield "class a far mode"
        yield "class b near mode"
        for name in CIFAR_CLASSES:
            yield f"a photo of a {name}"
        for label in COCO_LABELS:
            other = draw.choice(COCO_LABELS)
            box = ", ".join(str(draw.randrange(1001)) for _ in range(4))
            yield f"a photo of {draw.randint(2, 9)} {label}s, a {other}"
            yield f"{label} ({box}) {other} ({box})"


def train() -> bytes:
    """The model's bytes."""
    text = list(sentences())
    # Characters that no sentence uses get a piece by one more sentence: some versions of the
    # trainer abort on `required_chars` that are not in the text. The comma is among them
    # because the text has it only in the token ", ".
    ascii_characters = {chr(code) for code in range(33, 127)}
    text.append("".join(sorted(ascii_characters - set("".join(text)) | {","})))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_writer=model,
        model_type="bpe",
        vocab_size=NUM_PIECES,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        character_coverage=1.0,
        split_digits=True,
        # A comma and the blank after it are one token: boxes are four numbers long. The characters
        # of these pieces are among those that every text may use, so digits keep theirs.
        user_defined_symbols=[",\u2581", *map(str, range(1001))],
        num_threads=1,
        shuffle_input_sentence=False,
        minloglevel=2,
    )
    return model.getvalue()


def main(arguments: list[str]) -> int:
    """Write the model to the path given."""
    if len(arguments) != 1:
        print("usage: python -m kaleido_jax.data.train_vocabulary OUT.model", file=sys.stderr)
        return 2
    Path(arguments[0]).write_bytes(train())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
