"""Part two: Kaleido and its baseline on shapes, from weights trained beforehand."""

from __future__ import annotations

import dataclasses
import importlib.resources
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict

from kaleido_jax import generate
from kaleido_jax.data import shapes_detector, shapes_text
from kaleido_jax.data.shapes import THEMES
from kaleido_jax.demo import control, coverage
from kaleido_jax.demo.checks import Check
from kaleido_jax.errors import UserError
from kaleido_jax.latents import LatentDocument

MODELS = ("baseline", "kaleido")
WEIGHTS = (1.0, 2.0, 4.0, 8.0)
HUES = (("red", "blue"), ("green", "purple"), ("yellow", "blue"), ("red", "green"))
CAPTIONS = tuple(
    shapes_text.write_caption(theme, list(pair)) for theme, pair in zip(THEMES, HUES, strict=True)
)
SAMPLES = 48  # of each caption, model and weight
QUICK = {"num_steps": 2}
QUICK_SAMPLES = 2
BATCH = 24
EXPECTED_RATIO = 1.5


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Pictures of one model at one guidance weight: [captions * n], one caption after another."""

    images: UInt8[np.ndarray, "n h w 3"]
    documents: list[LatentDocument]
    modes: Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Shapes:
    """All pictures by model and guidance weight, and how they were sampled."""

    captions: tuple[str, ...]
    drawn: Mapping[str, Mapping[float, Drawn]]
    settings: Mapping[str, Any]


def shipped(model: str) -> pathlib.Path:
    """The export of the package's own weights; raises UserError where the package lacks it."""
    folder = importlib.resources.files("kaleido_jax") / "assets" / f"shapes_{model}"
    if not folder.is_dir():
        raise UserError(f"the package holds no weights {folder}; install it from a whole clone")
    return pathlib.Path(str(folder))


def open_models(folders: Mapping[str, str | os.PathLike]) -> dict[str, generate.Pipeline]:
    """The models 'baseline' and 'kaleido' of workdirs or exports.

    Raises:
      UserError: a folder holds no model, or the two are sampled differently by default.
    """
    pipes = {model: generate.Pipeline.from_pretrained(folders[model]) for model in MODELS}
    if pipes["baseline"].defaults != pipes["kaleido"].defaults:
        raise UserError("the two models of shapes have other defaults of sampling in their configs")
    return pipes


def run(
    pipes: Mapping[str, generate.Pipeline],
    quick: bool,
    seed: int,
    note: Callable[[str, float], None],
) -> Shapes:
    """Samples both models alike, and reads their pictures back.

    Args:
      pipes: from `open_models`.
      quick: a few steps and pictures.
      seed: of sampling.
      note: receives a line and the share of this part that is done.
    """
    changes = QUICK if quick else {}
    count = QUICK_SAMPLES if quick else SAMPLES
    documents = {model: draw_latents(pipes[model], count, seed) for model in MODELS}
    drawn: dict[str, dict[float, Drawn]] = {model: {} for model in MODELS}
    done = 0
    for weight in WEIGHTS:
        for model in MODELS:
            output = pipes[model].render(
                documents[model], guidance_weight=weight, batch_size=BATCH, **changes
            )
            captions = [document.caption for document in output.documents]
            modes = shapes_detector.read_modes(output.images, captions)
            drawn[model][weight] = Drawn(output.images, output.documents, modes)
            done += 1
            note(f"{model}, guidance {weight:g}", done / (len(WEIGHTS) * len(MODELS)))
    settings = dataclasses.asdict(pipes["baseline"].defaults.replace(changes))
    del settings["guidance_weight"]
    settings |= {
        "samples_per_caption": count,
        "batch_size": BATCH,
        "trained_alike": _trained_alike([pipe.config for pipe in pipes.values()]),
        "models": {
            model: {
                "checkpoint": drawn[model][1.0].documents[0].checkpoint_hash,
                "config": drawn[model][1.0].documents[0].model_config_hash,
                "latents": list(pipes[model].names),
            }
            for model in MODELS
        },
    }
    return Shapes(CAPTIONS, drawn, settings)


def _trained_alike(configs: Sequence[ConfigDict]) -> bool:
    """Whether models of shapes have the same pictures, steps and kind of network."""

    def what(config: ConfigDict) -> tuple[Any, ...]:
        training = config.train  # of a former version it may lack some fields
        return (
            config.data.source.to_dict(),
            config.model.denoiser.to_dict(),
            training.num_steps,
            training.get("noisy_steps", 0),
            training.get("noisy_share", 1.0),
            tuple(training.get("time_logit", ())),
        )

    first, *others = map(what, configs)
    return all(other == first for other in others)


def draw_latents(pipe: generate.Pipeline, count: int, seed: int) -> list[LatentDocument]:
    """`count` documents of each caption; guidance comes later, so that all weights share them.

    Every picture has random numbers of its own, and both models the same.
    """
    return [
        document
        for number, caption in enumerate(CAPTIONS)
        for document in pipe.draw_latents(
            caption, count, seed=seed, first_index=number * count, batch_size=BATCH
        )
    ]


def table(result: Shapes) -> list[dict[str, Any]]:
    """Effective numbers of modes: a row for each factor and guidance weight.

    Keys: factor, guidance, size (pictures that each entropy is estimated from), places (captions,
    or objects of captions, that are averaged), data (of the true distribution), theory (ideal
    guidance without latents), baseline and kaleido with their standard errors, ratio
    (kaleido / baseline), all of subsets of the same size; true and true_theory (of any number of
    pictures), and alone (ideal guidance if this factor were all that tells the theme).
    """
    each = len(result.drawn["baseline"][1.0].images) // len(result.captions)
    rows = []
    for factor in coverage.FACTORS:
        codes = {
            (model, weight): coverage.codes(drawn.modes, result.captions, factor)
            for model, by_weight in result.drawn.items()
            for weight, drawn in by_weight.items()
        }
        size, places = coverage.common(list(codes.values()), least=max(1, each // 3))
        captions = next(iter(codes.values())).captions
        captions = [c for c, kept in zip(captions, places, strict=True) if kept]
        data = coverage.expected(captions, factor, 1.0, size)
        for weight in result.drawn["baseline"]:
            found = {m: coverage.estimate(codes[m, weight], size, places) for m in result.drawn}
            ratio = found["kaleido"].effective / found["baseline"].effective
            rows.append(
                {
                    "factor": factor,
                    "guidance": weight,
                    "size": size,
                    "places": int(places.sum()),
                    "data": data.effective,
                    "theory": coverage.expected(captions, factor, weight, size).effective,
                    "baseline": found["baseline"].effective,
                    "baseline_error": found["baseline"].error,
                    "kaleido": found["kaleido"].effective,
                    "kaleido_error": found["kaleido"].error,
                    "ratio": ratio,
                    "true": coverage.true_modes(captions, factor, 1.0),
                    "true_theory": coverage.true_modes(captions, factor, weight),
                    "alone": coverage.alone(captions, factor, weight),
                }
            )
    return rows


def readable(result: Shapes) -> list[dict[str, Any]]:
    """Share of pictures that show both objects of their captions, by model and weight."""
    return [
        {
            "model": model,
            "guidance": weight,
            "pictures": len(drawn.images),
            "readable": coverage.readable(drawn.modes),
            "invalid_latents": sum("problems" in d.decoding for d in drawn.documents),
        }
        for model, by_weight in result.drawn.items()
        for weight, drawn in by_weight.items()
    ]


def followed(result: Shapes) -> list[dict[str, Any]]:
    """How well Kaleido's pictures follow its latents (control.followed), by guidance weight."""
    return [
        {"guidance": weight} | control.followed(drawn.images, drawn.documents)
        for weight, drawn in result.drawn["kaleido"].items()
    ]


def checks(rows: list[dict[str, Any]]) -> list[Check]:
    """What the paper claims of diversity under guidance, in numbers."""
    last = {row["factor"]: row for row in rows if row["guidance"] == max(WEIGHTS)}
    claim = "shapes: at guidance 8 Kaleido draws more modes than the baseline"
    return [
        Check(
            f"{claim} (effective modes of {coverage.HEADLINE}, ratio)",
            last[coverage.HEADLINE]["ratio"],
            ">=",
            EXPECTED_RATIO,
        )
    ]
