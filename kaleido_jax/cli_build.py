"""`kaleido build`: its arguments and what it runs."""

from __future__ import annotations

import argparse
import contextlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kaleido_jax import cli_arguments as arguments
from kaleido_jax.errors import UserError

_LOOK_EVERY = 1.0  # seconds


def add_build(verbs: argparse._SubParsersAction, name: str) -> argparse.ArgumentParser:
    """`kaleido build`."""
    parser = arguments.add_verb(
        verbs,
        name,
        "join pictures and latents by key into records, a TFDS data set, on Apache Beam",
        """
        kaleido build coco100 --images shards/coco100 --latents latents --out records
        kaleido build cc12m --images 'cc12m/{00000..01242}.tar' --latents latents --size 64 \\
            --out records -- --direct_num_workers=4 --direct_running_mode=multi_processing
        kaleido build imagenet --images train=tfds:imagenet2012/train --latents train=latents \\
            --images validation=tfds:imagenet2012/validation --out records
        kaleido build shapes --images shapes:10000 --size 64 --out records
        kaleido build mine --images shards --out records      # no latents: all of them empty

        Known: cc12m, imagenet, cifar10, coco100, shapes; any other name builds as well.
        Stopped, it goes on with the shards that are not done when the same command is given again.
        Words after -- are Beam's own; launch/annotate.sh has the flags for clusters.
        """,
    )
    parser.add_argument("dataset", metavar="NAME", help="of the data set: small letters, digits, _")
    parser.add_argument(
        "--images",
        action="append",
        default=[],
        metavar="[SPLIT=]SHARDS",
        help="a folder, a pattern or a {00000..00009} range of .tar shards, tfds:NAME/SPLIT, or "
        "shapes:COUNT[:SEED]; SPLIT is train where it is not said",
    )
    parser.add_argument(
        "--latents",
        action="append",
        default=[],
        metavar="[SPLIT=]DIR",
        help="what `kaleido annotate` wrote of the same shards",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="records go to DIR/NAME/SIZE")
    parser.add_argument(
        "--size",
        type=arguments.whole(8, 4096),
        metavar="N",
        help="side of the pictures (default: the data set's)",
    )
    parser.add_argument(
        "--encoding", choices=("jpeg", "png"), help="of the pictures (default: the data set's)"
    )
    parser.add_argument(
        "--quality",
        type=arguments.whole(1, 100),
        default=95,
        metavar="Q",
        help="of JPEG (default: 95)",
    )
    parser.add_argument(
        "--format",
        choices=("array_record", "tfrecord"),
        default="array_record",
        help="of the files (default: array_record)",
    )
    parser.add_argument("--version", default="1.0.0", help="of the data set (default: 1.0.0)")
    parser.add_argument(
        "--class-names",
        metavar="FILE",
        help="captions are the classes' names: lines of 'LABEL NAME' (imagenet has its own)",
    )
    parser.add_argument(
        "--max-bad-fraction",
        type=arguments.number(0.0, 1.0),
        default=0.02,
        metavar="F",
        help="fail when more examples cannot be used (default: 0.02)",
    )
    parser.add_argument("--data-dir", default="", metavar="DIR", help="folder of TFDS's data sets")
    return parser


def build(args: argparse.Namespace) -> None:
    """Builds and prints the counts."""
    from kaleido_jax.data import datasets

    known = datasets.dataset(args.dataset)
    images = by_split(args.images or ([known.images] if known.images else []), "--images")
    if not images:
        raise UserError("build: name --images, for example --images shards")
    names = None
    if args.class_names:
        names = datasets.read_class_names(args.class_names)
    elif known.imagenet_names:
        names = datasets.imagenet_class_names()
    _need("tensorflow_datasets", "array_record", "apache_beam", "pyarrow")

    from kaleido_jax.data import build_settings, records

    settings = build_settings.Build(
        dataset=known,
        out=args.out,
        images=images,
        annotations=by_split(args.latents, "--latents"),
        size=args.size or known.sizes[0],
        encoding=args.encoding or known.encoding,
        quality=args.quality,
        file_format=args.format,
        version=args.version,
        class_names=names,
        max_bad_fraction=args.max_bad_fraction,
        data_dir=args.data_dir,
        flags=tuple(args.beam),
    )
    manifest = records.build(settings, watch)
    print(table(manifest))
    print(f"records and manifest: {settings.folder}")


def by_split(words: Sequence[str], flag: str) -> dict[str, str]:
    """'train=A' or 'A' -> {"train": "A"}; raises UserError for a split given twice."""
    found: dict[str, str] = {}
    for word in words:
        split, equals, value = word.partition("=")
        if not equals or "/" in split or "." in split:
            split, value = "train", word
        if split in found:
            raise UserError(f"build: {flag} gives split {split!r} twice; commas join shards")
        if not value:
            raise UserError(f"build: {flag} {word!r} names nothing")
        found[split] = value
    return found


def table(manifest: dict[str, Any]) -> str:
    """Counts of every split and latent, in columns."""
    lines = []
    for split, counts in manifest["splits"].items():
        skipped = sum(counts["skipped"].values())
        lines.append(
            f"{split}: {counts['records']} records of {counts['listed']} examples, {skipped} "
            f"skipped, {counts['lost']} lost in broken shards"
        )
        columns = list(next(iter(counts["latents"].values())))
        lines.append(f"{'latent':<8}" + "".join(f"{column:>10}" for column in columns))
        for name, statuses in counts["latents"].items():
            lines.append(f"{name:<8}" + "".join(f"{statuses[c]:>10}" for c in columns))
    return "\n".join(lines)


@contextlib.contextmanager
def watch(folder: Path, total: int) -> Iterator[None]:
    """Shows on stderr how many shards are done, while the block runs; for any Beam runner."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    stop = threading.Event()

    def follow() -> None:
        with Progress(console=console, disable=not console.is_terminal) as bar:
            task = bar.add_task("build shards", total=total)
            while not stop.wait(_LOOK_EVERY):
                bar.update(task, completed=len(list(folder.glob("*.done.json"))))
            bar.update(task, completed=len(list(folder.glob("*.done.json"))))

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _need(*modules: str) -> None:
    import importlib.util

    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise UserError(
                f"build needs {module.replace('_', '-')}: "
                "pip install -c constraints.txt 'kaleido_jax[annotate,data]'"
            )
