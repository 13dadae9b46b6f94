"""One evaluation: sample what is missing, measure, append the result."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

import kaleido_jax
from kaleido_jax.errors import UserError
from kaleido_jax.evaluate import measure, results
from kaleido_jax.evaluate.adherence import make_detectors
from kaleido_jax.evaluate.data import Data
from kaleido_jax.evaluate.features import Feature, make_feature
from kaleido_jax.evaluate.pictures import PART, Pictures
from kaleido_jax.evaluate.protocols import Protocol
from kaleido_jax.evaluate.references import References, checked_count, open_references
from kaleido_jax.evaluate.subjects import Model, Subject, Theory, Truth
from kaleido_jax.generate import Pipeline
from kaleido_jax.locks import BusyError, sole_writer
from kaleido_jax.mesh import make_mesh
from kaleido_jax.metrics import bootstrap
from kaleido_jax.runlog import versions

BOOTSTRAP_SEED = 0
INTERVAL = {
    "level": bootstrap.LEVEL,
    "method": "bootstrap of captions, each with all its pictures",
    "seed": BOOTSTRAP_SEED,
}
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Request:
    """What to evaluate; every value that `kaleido evaluate` takes.

    Attributes:
      checkpoint: workdir, checkpoint or export. out: folder of pictures and results.
      name: of the model in results and figures; its folder's name where empty.
      protocol, protocol_name: sizes, and what results call them.
      guidance: weights, () for the config's own. seeds: of sampling, one run each.
      settings: other sampling settings. data: other values of `data.source`, held_out: the same
        for captions and true pictures alone.
      feature: for FEATURES; "" for `shapes` on shapes. metrics: names, None for all.
      detectors: for DETECTORS; None for those of the data.
      per_caption: pictures of each caption. per_latent: of these, how many share a z.
      true_latents: paint the held-out pictures' own z instead of drawing it.
      batch_size: pictures at once.
      shard: (i, n), this process makes every n-th part from the i-th.
      ceiling, theory: also measure true pictures, and those of a perfect guided model.
      model: False leaves the model out.
    """

    checkpoint: pathlib.Path
    out: pathlib.Path
    name: str
    protocol: Protocol
    protocol_name: str
    guidance: tuple[float, ...] = ()
    seeds: tuple[int, ...] = (0,)
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    data: Mapping[str, str] = dataclasses.field(default_factory=dict)
    held_out: Mapping[str, str] = dataclasses.field(default_factory=dict)
    feature: str = ""
    metrics: tuple[str, ...] | None = None
    detectors: tuple[str, ...] | None = None
    per_caption: int = 1
    per_latent: int = 1
    true_latents: bool = False
    batch_size: int = 50
    shard: tuple[int, int] = (0, 1)
    ceiling: bool = False
    theory: bool = False
    model: bool = True


def run(request: Request, say: Say = print) -> list[dict[str, Any]]:
    """Evaluates; results are appended to OUT/results.jsonl and returned.

    Run again after a kill it goes on where it stopped, with the same figures. With several shards
    the process that ends last measures; the others return nothing, nor does one that ends while
    another measures the same.

    Raises:
      UserError: anything that cannot be asked for.
    """
    # Each host samples its own parts on its own devices.
    mesh = make_mesh(devices=jax.local_devices())
    pipe = Pipeline.from_pretrained(request.checkpoint, mesh)
    data = Data(pipe.config, pipe.names, request.data, request.held_out)
    feature = make_feature(request.feature or _default_feature(data))
    names = measure.choose(request.metrics, feature, data.name)
    if _need_references(names):
        checked_count(request.protocol.references, data)
        measure.check_sizes(names, request.protocol, len(data))
    specs = default_detectors(pipe.names, data) if request.detectors is None else request.detectors
    if names == ("adherence",) and not (specs and pipe.names):
        why = "no detector looks" if pipe.names else "this model has no latents to follow"
        raise UserError(f"--metrics adherence: {why}")
    evaluation = _Evaluation(request, data, feature, names, specs, say)
    for subject, weight in _subjects(request, pipe, data):
        evaluation.evaluate(subject, weight)
    return evaluation.found


def _subjects(
    request: Request, pipe: Pipeline, data: Data
) -> Iterator[tuple[Subject, float | None]]:
    """Everything that is measured, with its guidance weight; settings are checked at once."""
    weights = request.guidance or (pipe.defaults.guidance_weight,)
    found: list[tuple[Subject, float | None]] = []
    for seed in request.seeds if request.model else ():
        for weight in weights:
            settings = {**request.settings, "guidance_weight": weight}
            each = request.per_caption, request.per_latent
            model = Model(
                pipe, data, settings, seed, *each, request.batch_size, request.true_latents
            )
            found.append((model, weight))
    if request.ceiling:
        data.check_apart(request.protocol.references, request.protocol.samples)
        # Other records than the last there are not: another seed would be the same pictures.
        seeds = request.seeds if data.name == "shapes" else request.seeds[:1]
        found += [(Truth(data, pipe.names, seed), None) for seed in seeds]
    if request.theory:
        found += [(Theory(data, w, seed), w) for seed in request.seeds for w in weights]
    return iter(found)


def _need_references(names: Sequence[str]) -> bool:
    return bool({"fid", *measure.NEIGHBOURS} & set(names))


def _default_feature(data: Data) -> str:
    if data.name == "shapes":
        return "shapes"
    raise UserError(
        "--feature NAME is needed: inception:DIR (after `kaleido import inception`), or random"
    )


def default_detectors(names: Sequence[str], data: Data) -> tuple[str, ...]:
    """Those that need no weights and fit a model's latents."""
    found = ["shapes"] if data.name == "shapes" and set(names) - {"voken"} else []
    if "voken" in names:
        path = data.describe()["source"].get("vokens", "")
        found.append(f"patch:{path}" if path else "patch")
    return tuple(found)


class _Evaluation:
    """What the subjects of one request share; references are opened when they are needed."""

    def __init__(
        self,
        request: Request,
        data: Data,
        feature: Feature,
        names: Sequence[str],
        detectors: Sequence[str],
        say: Say,
    ):
        self._request, self._data, self._feature = request, data, feature
        self._names, self._say = tuple(names), say
        self._detectors = make_detectors(detectors)
        self._references: References | None = None
        self._path = request.out / results.RESULTS
        self.found: list[dict[str, Any]] = []

    def evaluate(self, subject: Subject, weight: float | None) -> None:
        """Samples and measures one subject, unless its result is there already."""
        request, begun = self._request, time.monotonic()
        asked = {
            "identity": subject.identity,
            "protocol": dataclasses.asdict(request.protocol),
            "feature": self._feature.describe(),
            "metrics": self._names,
            "detectors": [{"judges": d.judges, **d.identity} for d in self._detectors],
            "interval": INTERVAL,
        }
        key = results.identify(asked)
        if self._known(key, subject):
            return
        folder = request.out / "pictures" / results.identify(subject.identity)
        # True pictures have no batches, and are the same whatever the model's.
        batch_size = subject.identity.get("batch_size", PART)
        pictures = Pictures(folder, subject, request.protocol.samples, batch_size)
        shard, shards = request.shard
        with sole_writer(folder / f"shard_{shard}_of_{shards}", "kaleido evaluate"):
            missing = [p for p in pictures.missing() if p % shards == shard]
            with self._progress(f"{subject.label}: sampling", len(missing)) as tick:
                for part in missing:
                    pictures.make(part)
                    tick(1)
        left = pictures.missing()
        if left:
            self._say(f"{subject.label}: {len(left)} parts of other shards are not there yet")
            return
        try:
            with sole_writer(folder / "measuring" / key, "kaleido evaluate"):
                if not self._known(key, subject):
                    self._measure(key, asked, subject, weight, pictures, begun)
        except BusyError:  # shards that end together: one measures, the others go on
            self._say(f"{subject.label}: another process is measuring it")

    def _known(self, key: str, subject: Subject) -> bool:
        """Whether the result is there already, which is then found."""
        known = [result for result in results.read_results(self._path) if result["id"] == key]
        if known:
            self._say(f"{subject.label}: already in {self._path}")
            self.found += known[:1]
        return bool(known)

    def _measure(
        self,
        key: str,
        asked: Mapping[str, Any],
        subject: Subject,
        weight: float | None,
        pictures: Pictures,
        begun: float,
    ) -> None:
        request, names, draws = self._request, self._names, self._request.protocol.bootstrap
        each = subject.identity.get("per_caption", 1)
        found, followed, tables, groups = measure.by_reading(
            names,
            pictures,
            self._detectors,
            1.0 if weight is None else weight,
            draws,
            each,
            BOOTSTRAP_SEED,
        )
        reference = None
        references = None
        if _need_references(names):
            references = self._open_references()
            reference = {"hash": references.hash, "count": references.count}
        if set(names) - {"adherence", "tv"}:
            with self._progress(f"{subject.label}: features", pictures.count) as tick:
                features, logits = pictures.features(self._feature, tick)
            found = found | measure.by_features(
                names,
                features,
                logits,
                groups,
                references,
                request.protocol,
                each,
                BOOTSTRAP_SEED,
                lambda line: self._say(f"{subject.label}: {line}"),
            )
        result = {
            "version": 1,
            "id": key,
            "made_by": f"kaleido_jax {kaleido_jax.__version__}",
            "name": request.name if subject.identity["subject"] == "model" else "",
            **subject.identity,
            "guidance_weight": weight,
            "samples": pictures.count,
            "protocol": {"name": request.protocol_name, **dataclasses.asdict(request.protocol)},
            "feature": self._feature.describe(),
            "references": reference,
            "detectors": asked["detectors"],
            "interval": INTERVAL,
            "metrics": found,
            "adherence": followed,
            "modes": tables,
            "versions": versions(),
            "device": jax.devices()[0].device_kind,
            "seconds": round(time.monotonic() - begun, 1),
        }
        result = results.plain(result)
        results.append(self._path, result)
        results.write_tensorboard(request.out, result, asked, self._say)
        self.found.append(result)

    def _open_references(self) -> References:
        if self._references is None:
            count = self._request.protocol.references
            with self._progress("references", count or len(self._data)) as tick:
                self._references = open_references(
                    self._request.out / "references", self._data, self._feature, count, tick
                )
            # Fewer than asked for may have been readable.
            readable = dataclasses.replace(
                self._request.protocol, references=self._references.count
            )
            measure.check_sizes(self._names, readable, self._references.count)
        return self._references

    @contextlib.contextmanager
    def _progress(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """A line now and then, with the time that is left."""
        begun = said = time.monotonic()
        done = 0

        def tick(count: int) -> None:
            nonlocal done, said
            done += count
            now = time.monotonic()
            if now - said > 10 or done >= total:
                said = now
                left = (now - begun) / done * max(0, total - done)
                minutes, seconds = divmod(round(left), 60)
                self._say(f"{what}: {done:,} of {total:,}, {minutes}:{seconds:02} left")

        yield tick
