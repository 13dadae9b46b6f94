"""All metrics of one set of pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kaleido_jax.data import shapes_detector
from kaleido_jax.errors import UserError
from kaleido_jax.evaluate import adherence, modes
from kaleido_jax.evaluate.features import Feature
from kaleido_jax.evaluate.pictures import Pictures
from kaleido_jax.evaluate.protocols import Protocol
from kaleido_jax.evaluate.references import References
from kaleido_jax.evaluate.results import entry, identify
from kaleido_jax.metrics import bootstrap, diversity, frechet, neighbours
from kaleido_jax.metrics.rows import Rows

KS = (3, 5)
NEIGHBOURS = ("precision", "recall", "density", "coverage")
OF_PICTURES = ("precision", "density")  # a mean over pictures; of the others over references
# Name -> what it is. `fid` is the Frechet distance of whatever feature is chosen.
METRICS = {
    "fid": "Frechet distance to the references",
    **dict.fromkeys(NEIGHBOURS, "by nearest neighbours, k = 3 and 5"),
    "is": "Inception score (needs a feature with classes)",
    "vendi": "Vendi score, the effective number of different pictures",
    "similarity": "mean cosine of two pictures of one caption",
    "adherence": "how well pictures follow their latents",
    "tv": "total variation of modes to the true tables (shapes)",
}
Say = Callable[[str], None]
Entries = dict[str, dict[str, Any]]
Groups = tuple[Sequence[str], Sequence[str]]  # caption and hash of z of each picture


def choose(names: Sequence[str] | None, feature: Feature, data: str) -> tuple[str, ...]:
    """The metrics to compute; by default all that feature and data allow.

    Raises:
      UserError: an unknown name, or one that cannot be.
    """
    for name in names or ():
        if name not in METRICS:
            raise UserError(f"no metric {name!r}; one of {', '.join(METRICS)}")
    impossible = {
        "is": "" if feature.classes else f"feature {feature.name!r} has no classes",
        "tv": "" if data == "shapes" else f"the modes of {data!r} are not known",
    }
    for name in names or ():
        if impossible.get(name):
            raise UserError(f"metric {name!r}: {impossible[name]}")
    return tuple(n for n in METRICS if (n in names if names else not impossible.get(n)))


def check_sizes(names: Sequence[str], protocol: Protocol, available: int) -> None:
    """Raises UserError for fewer pictures or references than metrics with references need.

    Args:
      available: training pictures, all of which a size of 0 stands for.
    """
    references = protocol.references or available
    sizes = {
        "--samples": protocol.samples,
        "--references": references,
        "--neighbours": min(protocol.neighbours or references, references),
    }
    near = [name for name in NEIGHBOURS if name in names]
    for option, size in sizes.items():
        if near and size <= max(KS):
            raise UserError(f"{option} {size}: {', '.join(near)} need at least {max(KS) + 1}")
        if "fid" in names and size < 2 and option != "--neighbours":
            raise UserError(f"{option} {size}: fid needs at least 2")


def by_features(
    names: Sequence[str],
    features: Rows,
    logits: Rows,
    groups: Groups,
    references: References | None,
    protocol: Protocol,
    each: int,
    seed: int,
    say: Say,
) -> Entries:
    """Entries of the metrics of features; `references` are for `fid` and NEIGHBOURS.

    `seed` is of the intervals, which draw runs of `each` pictures, those of one caption.
    """
    found: Entries = {}
    count, draws = len(features), protocol.bootstrap

    def interval_of(statistic: Callable[[np.ndarray], float]) -> tuple[float, tuple]:
        return bootstrap.of_statistic(statistic, count, draws, seed, each)

    if "fid" in names:
        say(f"FID of {count:,} pictures, {draws} resamples")
        root = frechet.square_root(references.moments.covariance)

        def fid(counts: np.ndarray) -> float:
            ours = frechet.moments(features, counts)
            return frechet.frechet_distance(references.moments, ours, root)

        found["fid"] = entry(*interval_of(fid), count, references=references.moments.count)
    chosen = [name for name in NEIGHBOURS if name in names]
    if chosen:
        real = references.features.head(protocol.neighbours or len(references.features))
        say(f"neighbours of {count:,} and {len(real):,} pictures")
        for k, manifold in neighbours.manifolds(real, features, KS).items():
            for name in chosen:
                values = getattr(manifold, name)
                of = np.arange(count) // each if name in OF_PICTURES else None
                value = bootstrap.of_mean(values, draws, seed, of)
                found[f"{name}_{k}"] = entry(*value, count, references=len(real), k=k)
    if "is" in names:
        splits = min(protocol.splits, count)
        value = interval_of(lambda c: diversity.inception_score(logits, splits, c))
        found["is"] = entry(*value, count, splits=splits)
    if "vendi" in names:
        say(f"Vendi score, {draws} resamples")
        found["vendi"] = entry(*interval_of(lambda c: diversity.vendi_score(features, c)), count)
    if "similarity" in names:
        captions, latents = groups
        of = diversity.similarity_within(features, captions, latents or None)
        for name, pairs in zip(("", "_same_z", "_other_z"), of, strict=True):
            if len(pairs):
                value = bootstrap.of_mean(pairs, draws, seed)
                found[f"similarity{name}"] = entry(*value, count, captions=len(pairs))
    return found


def by_reading(
    names: Sequence[str],
    pictures: Pictures,
    detectors: Sequence[adherence.Detector],
    weight: float,
    draws: int,
    each: int,
    seed: int,
) -> tuple[Entries, Entries, dict[str, Any], Groups]:
    """Entries of modes and of adherence, the tables of modes, caption and z of all pictures.

    Intervals draw runs of `each` pictures, those of one caption, with all that is written for them.
    z is left out where no picture has one, and where no similarity is asked for.
    """
    captions: list[str] = []
    latents: list[str] = []
    judged: list[tuple[int, adherence.Found]] = []
    read: dict[str, list[np.ndarray]] = {}
    stated: dict[str, list[np.ndarray]] = {}
    grounded = painted = False
    for images, documents in pictures:
        texts = [document.caption for document in documents]
        first = len(captions)
        captions += texts
        painted |= any(document.latents for document in documents)
        if "similarity" in names:
            latents += [identify(dict(document.latents)) for document in documents]
        if "adherence" in names:
            judged += [(first, detector.judge(images, documents)) for detector in detectors]
        if "tv" in names:
            for name, values in shapes_detector.read_modes(images, texts).items():
                read.setdefault(name, []).append(values)
            if any({"bbox", "blob"} & document.latents.keys() for document in documents):
                grounded = True
            for name, values in modes.written(documents).items():
                stated.setdefault(name, []).append(values)
    found, tables = {}, {}
    if read:
        together = {name: np.concatenate(values) for name, values in read.items()}
        found, tables = modes.measure(together, captions, weight, draws, seed, each, entry)
    if read and grounded:
        together = {name: np.concatenate(values) for name, values in stated.items()}
        of_z = modes.measure(together, captions, weight, draws, seed, each, entry)[0]
        found |= {f"z_{k}": v for k, v in of_z.items() if k.startswith(("tv", "modes"))}
    followed = {}
    for name, pairs in adherence.merge(judged).items():
        of = np.array([row for row, _ in pairs], int) // each
        value = bootstrap.of_mean(np.array([value for _, value in pairs]), draws, seed, of)
        followed[name] = entry(*value, len(pairs))
    return found, followed, tables, (captions, latents if painted else [])
