"""Figures of pictures: diversity (1 and 7), control (6), editing (8 and 14)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from kaleido_jax import editing
from kaleido_jax.errors import UserError
from kaleido_jax.figures import grids
from kaleido_jax.generate import Output, Pipeline
from kaleido_jax.latents import LatentDocument, bbox, blob, panel
from kaleido_jax.latents.edit import objects

COLUMNS, ROWS = 4, 2  # pictures of one cell of `diversity`
Drawing = tuple[Figure, list[dict[str, Any]]]


def diversity(
    pipes: Mapping[str, Pipeline],
    captions: Sequence[str],
    weights: Sequence[float],
    seed: int,
    settings: Mapping[str, Any],
) -> Drawing:
    """Pictures of each model at rising guidance; a model's weights share latents and noise.

    Args:
      pipes: models by the names that rows get.
      settings: other sampling settings, the same for all.
    """
    each = COLUMNS * ROWS
    pictures: dict[str, dict[float, list]] = {}
    rows = []
    for model, pipe in pipes.items():
        documents = _draw(pipe, captions, each, seed, settings)
        pictures[model] = {}
        for weight in weights:
            output = pipe.render(documents, guidance_weight=weight)
            pictures[model][weight] = [
                output.images[each * n : each * (n + 1)] for n in range(len(captions))
            ]
            rows += [_row(document, model=model) for document in output.documents]
    return grids.by_guidance(captions, pictures, COLUMNS, ROWS), rows


def control(
    pipe: Pipeline, captions: Sequence[str], each: int, seed: int, settings: Mapping[str, Any]
) -> Drawing:
    """Pictures with the latents that they were drawn from, `each` of every caption in a row.

    Raises:
      UserError: a model without latents.
    """
    if not pipe.names:
        raise UserError("figures control: this model has no latents to show")
    output = pipe.render(_draw(pipe, captions, each, seed, settings))
    shown = [panel(i, d.latents) for i, d in zip(output.images, output.documents, strict=True)]
    titles = [document.caption for document in output.documents]
    return grids.panels(shown, titles, each), [_row(document) for document in output.documents]


def edited(output: Output, steps: Sequence[editing.Step]) -> Drawing:
    """A picture and what became of it, step by step, with the latents.

    Args:
      output: of Pipeline.edit.
      steps: what was done.
    """
    words = ["before", *("\n".join(f"{verb} {what}" for verb, what in step) for step in steps)]
    shown = [panel(i, d.latents) for i, d in zip(output.images, output.documents, strict=True)]
    rows = [
        _row(document, step=number, edits=text.replace("\n", "; "))
        for number, (document, text) in enumerate(zip(output.documents, words, strict=True))
    ]
    return grids.panels(shown, words, len(shown)), rows


def default_steps(document: LatentDocument, hues: Sequence[str]) -> list[editing.Step]:
    """Edits of a document's first object: moved, made larger, given another of `hues`.

    Raises:
      UserError: no boxes or blobs to edit.
    """
    name = next((n for n in ("bbox", "blob") if document.latents.get(n)), None)
    found = objects(name, document.latents[name]) if name else []
    if not found:
        raise UserError("figures editing: no object to edit; name edits with --script FILE")
    phrase, shape = found[0]
    across = (shape.x1 + shape.x2) // 2 if isinstance(shape, bbox.Box) else shape.xc
    steps = [[("resize", "#1=1.3")]]
    if room := _room(shape, left=across > 500):
        steps.insert(0, [("move", f"#1={room},0")])
    words = phrase.split()
    old = next((hue for hue in hues if hue in words), None)
    if old is not None:
        used = {word for other, _ in found for word in other.split()}
        other = next((hue for hue in hues if hue not in used), None)
        if other is not None:
            steps.append([("word", f"{old}={other}")])
    return steps


def _room(shape: bbox.Box | blob.Ellipse, left: bool) -> int:
    """How far an object can be moved and stay in the picture, 120 at most; negative to the left."""
    low, high = (shape.x1, shape.x2) if isinstance(shape, bbox.Box) else (shape.xc, shape.xc)
    return -min(120, low) if left else min(120, 1000 - high)


def _draw(
    pipe: Pipeline, captions: Sequence[str], each: int, seed: int, settings: Mapping[str, Any]
) -> list[LatentDocument]:
    """`each` documents of every caption, all of them with random numbers of their own."""
    firsts = [each * number for number in range(len(captions))]
    return pipe.draw_latents(captions, each, seed=seed, first_index=firsts, **settings)


def _row(document: LatentDocument, **more: Any) -> dict[str, Any]:
    """What of a document stands in the CSV."""
    return more | {
        "caption": document.caption,
        "guidance": document.guidance_weight,
        "seed": document.seed,
        "index": document.sample_index,
        "checkpoint": document.checkpoint_hash,
        "latents": json.dumps(document.latents),
    }
