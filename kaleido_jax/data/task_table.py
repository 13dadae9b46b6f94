"""The names of data: one line per data set and latent, and mixtures across latents.

`kaleido_jax.data.tasks` registers all of them with seqio; the loader reads them by the same names
without TensorFlow (`task_source`). Both streams are the same, example for example.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kaleido_jax.data.reader import MAX_BAD_FRACTION
from kaleido_jax.data.record_source import LATENT_NAMES, RecordSource, split_names
from kaleido_jax.data.sources import Source
from kaleido_jax.data.streams import Mixture, quotas
from kaleido_jax.errors import UserError

CAPTION_LENGTH = 128
NUM_VOKENS = 8192  # of the paper's codebook (Fig. 14)
# Names of the latents in z, and tokens of z with EOS for T5's pieces: 80 words, six objects.
LATENT_SETS = {
    "text": (("text",), 128),
    "bbox": (("bbox",), 112),
    "blob": (("blob",), 128),
    "voken": (("voken",), 33),
    "combined": (("text", "bbox", "voken"), 288),
}


@dataclass(frozen=True)
class TaskSpec:
    """Records with some of their latents.

    Attributes:
      name: as seqio knows it.
      records: their folder below the data folder: NAME/CONFIG, newest version.
      size: side of the pictures.
      latents: names of the latents in z, in order.
      latent_length: tokens of z with EOS.
    """

    name: str
    records: str
    size: int
    latents: tuple[str, ...]
    latent_length: int


@dataclass(frozen=True)
class MixtureSpec:
    """Tasks of one picture size mixed at fixed rates.

    Attributes:
      name: as seqio knows it.
      rates: task's name -> share.
    """

    name: str
    rates: Mapping[str, float]

    @property
    def tasks(self) -> tuple[TaskSpec, ...]:
        """The tasks in order."""
        return tuple(TASKS[name] for name in self.rates)

    @property
    def size(self) -> int:
        """Side of the pictures."""
        return self.tasks[0].size

    @property
    def latents(self) -> tuple[str, ...]:
        """All the latents that occur. With several, z tells by section tokens which it holds."""
        return tuple(n for n in LATENT_NAMES if any(n in task.latents for task in self.tasks))

    @property
    def latent_length(self) -> int:
        """Tokens of the longest z with EOS; one more for each section token of a single latent."""
        sections = 1 if len(self.latents) > 1 else 0
        return max(t.latent_length + sections * (len(t.latents) == 1) for t in self.tasks)


TASKS: dict[str, TaskSpec] = {}
MIXTURES: dict[str, MixtureSpec] = {}


def add_task(
    name: str, records: str, size: int, latents: Sequence[str], latent_length: int
) -> TaskSpec:
    """Adds a line to the table.

    Raises:
      UserError: a name that is taken, an unknown latent.
    """
    _check_free(name)
    for latent in latents:
        if latent not in LATENT_NAMES:
            raise UserError(
                f"task {name}: no latent {latent!r} (there are {', '.join(LATENT_NAMES)})"
            )
    TASKS[name] = TaskSpec(name, records, size, tuple(latents), latent_length)
    return TASKS[name]


def add_mixture(name: str, rates: Mapping[str, float]) -> MixtureSpec:
    """Adds a mixture of tasks.

    Raises:
      UserError: a name that is taken, an unknown task, pictures of different sizes, rates that no
        mixture can have (see `streams.quotas`).
    """
    _check_free(name)
    specs = [find(task) for task in rates]
    if not specs or any(not isinstance(spec, TaskSpec) for spec in specs):
        raise UserError(f"mixture {name}: it needs tasks, and tasks only")
    if len({spec.size for spec in specs}) > 1:
        raise UserError(f"mixture {name}: its tasks have pictures of different sizes")
    quotas(rates)
    MIXTURES[name] = MixtureSpec(name, dict(rates))
    return MIXTURES[name]


def _check_free(name: str) -> None:
    if name in TASKS or name in MIXTURES:
        raise UserError(f"there is a task or mixture {name!r} already")


def find(name: str) -> TaskSpec | MixtureSpec:
    """The task or mixture of a name; UserError naming the nearest."""
    spec = TASKS.get(name) or MIXTURES.get(name)
    if spec is None:
        near = difflib.get_close_matches(name, [*TASKS, *MIXTURES], 1, cutoff=0.0)
        raise UserError(
            f"no task {name!r}; the nearest is {near[0]!r} (`kaleido tasks` lists them all)"
        )
    return spec


def data_folder(path: str | Path = "") -> Path:
    """The folder that holds the records of all tasks.

    The path given, else the environment's TFDS_DATA_DIR, else TFDS's own default.
    """
    return Path(path or os.environ.get("TFDS_DATA_DIR") or Path.home() / "tensorflow_datasets")


def task_source(
    task: str,
    path: str = "",
    split: str = "train",
    latents: Sequence[str] | None = None,
    size: int | None = None,
    max_bad_fraction: float = MAX_BAD_FRACTION,
) -> Source:
    """The records of a task, or the mixture of its tasks' records, without TensorFlow.

    Args:
      task: its name.
      path: the data folder, see `data_folder`.
      split: of the data set.
      latents: those that z will hold, () for the baseline; None: the task's own. They must be the
        task's.
      size: side of the pictures; None: the task's.
      max_bad_fraction: share of records in missing files that is borne.

    Raises:
      UserError: no such task, other latents or another size than the task's, no such records.
    """
    spec = find(task)
    if latents and tuple(latents) != spec.latents:
        raise UserError(
            f"task {task} has the latents {spec.latents}, the config's 'latents' are "
            f"{tuple(latents)}"
        )
    if size is not None and size != spec.size:
        raise UserError(
            f"task {task} has pictures of {spec.size} pixels, the config's 'data.image_size' is "
            f"{size}"
        )
    keep = latents is None or bool(latents)

    def records(one: TaskSpec) -> RecordSource:
        names = one.latents if keep else ()
        folder = str(data_folder(path) / one.records)
        return RecordSource(folder, names, one.size, split, max_bad_fraction)

    if isinstance(spec, TaskSpec):
        return records(spec)
    return Mixture({one.name: records(one) for one in spec.tasks}, spec.rates)


def splits(spec: TaskSpec, path: str = "") -> dict[str, int]:
    """Split -> number of records, of the records that a task finds in a data folder.

    Raises:
      UserError: no such records.
    """
    folder = str(data_folder(path) / spec.records)
    return {name: len(RecordSource(folder, (), split=name)) for name in split_names(folder)}


# The data sets: folder, pictures' side. `kaleido build` makes the records.
_DATA_SETS = (
    ("cc12m", 64),
    ("cc12m", 256),
    ("imagenet", 64),
    ("imagenet", 256),
    ("cifar10", 32),
    ("coco100", 64),
    ("coco100", 256),
    ("shapes", 32),
    ("shapes", 64),
)

for _data, _size in _DATA_SETS:
    for _latent, (_names, _length) in LATENT_SETS.items():
        add_task(f"{_data}_{_size}_{_latent}", f"{_data}/{_size}", _size, _names, _length)
    # Each kind of z alone and all together, told apart by their section tokens.
    add_mixture(
        f"{_data}_{_size}_mixture",
        {
            f"{_data}_{_size}_{_latent}": 3 if _latent == "combined" else 1
            for _latent in LATENT_SETS
        },
    )
