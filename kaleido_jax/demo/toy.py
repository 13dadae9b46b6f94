"""Part one: the toy of Figure 3, trained from scratch, sampled at rising guidance."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Float

from kaleido_jax import generate, training_loop
from kaleido_jax.data import toy as data
from kaleido_jax.demo import configs
from kaleido_jax.demo.checks import Check

MODELS = {"baseline": ("latents=()",), "kaleido": ()}
WEIGHTS = (1.0, 2.0, 4.0, 8.0)
SAMPLES = 500  # of each class at each weight
QUICK = ("train.num_steps=4", "train.batch_size=8", "sample.steps=4", "train.checkpoint_every=4")
QUICK_SAMPLES = 16

Points = Float[np.ndarray, "classes n 2"]
# Share of each mode among the samples of its class.
Shares = Float[np.ndarray, "classes modes"]


@dataclasses.dataclass(frozen=True)
class Toy:
    """Points of the data, of both models by guidance weight, and how those were trained."""

    data: Points
    samples: Mapping[str, Mapping[float, Points]]
    steps: int
    batch_size: int

    def shares(self, model: str, weight: float) -> Shares:
        """Share of each mode in a model's samples."""
        return mode_shares(self.samples[model][weight])


def run(
    folder: pathlib.Path,
    quick: bool,
    seed: int,
    note: Callable[[str, float], None],
) -> Toy:
    """Trains the baseline and Kaleido in `folder`/MODEL and samples both.

    Args:
      folder: for the workdirs.
      quick: a few steps of everything.
      seed: of training and sampling.
      note: receives a line and the share of this part that is done.
    """
    samples = {}
    for number, (model, changes) in enumerate(MODELS.items()):
        config = configs.load("toy", (f"seed={seed}", *changes, *(QUICK if quick else ())))

        def say(line: str, model=model, number=number, total=config.train.num_steps) -> None:
            if line.startswith("step "):  # of training's lines, those of its progress
                step = int(line.split()[1].partition("/")[0].replace(",", ""))
                losses = "  ".join(line.split("  ")[:3])
                note(f"{model}: {losses}", (number + 0.8 * step / total) / len(MODELS))

        training_loop.train(config, folder / model, say=say)
        pipe = generate.Pipeline.from_pretrained(folder / model)
        samples[model] = sample(pipe, QUICK_SAMPLES if quick else SAMPLES, seed)
        note(f"{model}: sampled", (number + 1) / len(MODELS))
    points = true_points(QUICK_SAMPLES if quick else SAMPLES, seed)
    return Toy(points, samples, config.train.num_steps, config.train.batch_size)


def sample(pipe: generate.Pipeline, count: int, seed: int) -> dict[float, Points]:
    """`count` points of each class at each guidance weight, of the same latents."""
    documents = [
        document
        for group, name in enumerate(data.CLASSES)
        for document in pipe.draw_latents(
            name, count, seed=seed, first_index=group * count, batch_size=count
        )
    ]
    found = {}
    for weight in WEIGHTS:
        output = pipe.render(documents, guidance_weight=weight, batch_size=len(documents))
        found[weight] = output.samples.reshape(len(data.CLASSES), count, 2)
    return found


def true_points(count: int, seed: int) -> Points:
    """The first `count` points of each class, of data that no model was trained on."""
    source = data.ToySource(seed=seed + 1)
    found: list[list[np.ndarray]] = [[] for _ in data.CLASSES]
    index = 0
    while min(map(len, found)) < count:
        example = source[index]
        found[data.CLASSES.index(example["caption"])].append(example["image"][0, 0])
        index += 1
    return np.array([points[:count] for points in found])


def mode_shares(points: Points) -> Shares:
    """Share of each mode among the points of its class."""
    modes = data.CENTRES.shape[1]
    return np.array(
        [
            np.bincount(data.nearest_mode(own, group), minlength=modes) / len(own)
            for group, own in enumerate(points)
        ]
    )


def checks(result: Toy) -> list[Check]:
    """What the paper's Figure 3 claims, in numbers."""
    half = data.WEIGHTS.min() / 2
    weaker = {w: float(result.shares("baseline", w).min(1).max()) for w in WEIGHTS}
    kept = float(result.shares("kaleido", 8.0).min())
    return [
        Check(
            "toy: at guidance 4 each class's weaker mode is collapsing in the baseline"
            " (under half of its share in the data)",
            weaker[4.0],
            "<",
            float(half),
            True,
        ),
        Check(
            "toy: at guidance 8 each class's weaker mode is gone from the baseline",
            weaker[8.0],
            "<",
            0.05,
            True,
        ),
        Check("toy: at guidance 8 Kaleido keeps all four modes", kept, ">=", 0.15, True),
    ]


def rows(result: Toy) -> list[dict]:
    """One row per (model, guidance weight, class, mode), the data's first."""
    found = []
    tables = [("data", None, mode_shares(result.data))]
    tables += [(m, w, result.shares(m, w)) for m in result.samples for w in result.samples[m]]
    for model, weight, shares in tables:
        for group, name in enumerate(data.CLASSES):
            for mode, mode_name in enumerate(data.MODES):
                found.append(
                    {
                        "model": model,
                        "guidance": weight,
                        "class": name,
                        "mode": mode_name,
                        "share": round(float(shares[group, mode]), 4),
                    }
                )
    return found
