"""The data sets that `kaleido build` knows by name. A new one is one entry here.

Any other name builds too, with the defaults of DataSet: the table only saves options.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from kaleido_jax.errors import UserError

_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")


@dataclass(frozen=True)
class DataSet:
    """What is usual for a data set.

    Attributes:
      name: the folder of its records, and its name for TFDS.
      about: one sentence for the metadata.
      homepage: where it comes from.
      sizes: sides of the pictures that configs use; the first is the default.
      encoding: of the pictures in the records.
      images: what `--images` is where nobody says; "" where it must be said.
      imagenet_names: captions are the names of ImageNet's classes.
    """

    name: str
    about: str = "Pictures with captions and latents."
    homepage: str = ""
    sizes: tuple[int, ...] = (256, 64)
    encoding: str = "jpeg"
    images: str = ""
    imagenet_names: bool = False


DATASETS = {
    data.name: data
    for data in (
        DataSet(
            "cc12m",
            "Conceptual 12M, from shards that img2dataset made of its list of addresses.",
            "https://github.com/google-research-datasets/conceptual-12m",
        ),
        DataSet(
            "imagenet",
            "ImageNet 2012, from TFDS, with the names of its classes as captions.",
            "https://image-net.org",
            images="train=tfds:imagenet2012/train",
            imagenet_names=True,
        ),
        DataSet(
            "cifar10",
            "CIFAR-10: 32 x 32 pictures of ten classes.",
            "https://www.cs.toronto.edu/~kriz/cifar.html",
            sizes=(32,),
            encoding="png",
        ),
        DataSet(
            "coco100",
            "98 photographs of COCO with their true boxes and polygons.",
            "https://cocodataset.org",
            sizes=(64, 256),
        ),
        DataSet(
            "shapes",
            "Coloured tilted shapes on grey, drawn from a seed, with true latents.",
            sizes=(64, 32),
            encoding="png",
            images="shapes:10000",
        ),
    )
}


def dataset(name: str) -> DataSet:
    """The entry of this name, or one of defaults for a data set of one's own.

    Raises:
      UserError: a name that TFDS would not take.
    """
    if not _NAME.fullmatch(name):
        raise UserError(
            f"build: {name!r} cannot name a data set; small letters, digits and _ can, for "
            f"example {', '.join(DATASETS)}"
        )
    return DATASETS.get(name) or DataSet(name)


def read_class_names(path: str) -> dict[str, str]:
    """Names of classes from a text file of `LABEL NAME, SYNONYM, ...`; the first name counts.

    Raises:
      UserError: a file that cannot be read, or a line without a name.
    """
    try:
        lines = Path(path).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    names: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        label, _, rest = line.strip().partition("\t" if "\t" in line else " ")
        name = " ".join(rest.split(",")[0].split())
        if not name or label in names:
            raise UserError(
                f"{path} line {number}: needs a label of its own and a name, for example "
                "'n01440764 tench, Tinca tinca'"
            )
        names[label] = name
    if not names:
        raise UserError(f"{path} names no class")
    return names


def imagenet_class_names() -> dict[str, str]:
    """ImageNet's 1,000 classes, label -> first name, as TFDS carries them.

    Raises:
      UserError: TFDS is missing.
    """
    try:
        import tensorflow_datasets as tfds
        from tensorflow_datasets.datasets.siscore import labels
    except ImportError as error:
        raise UserError(
            "the names of ImageNet's classes come with TFDS: pip install 'kaleido_jax[data]', or "
            "give --class-names FILE"
        ) from error
    # Both lists are in the order of the labels.
    wnids = tfds.core.tfds_path("datasets/imagenet2012/labels.txt").read_text().split()
    return {
        label: name.split(",")[0]
        for label, name in zip(wnids, labels.IMAGENET_LABELS_LIST, strict=True)
    }
