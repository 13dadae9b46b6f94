"""The arguments of each verb of `kaleido`, their limits, help and examples."""

from __future__ import annotations

import argparse
import math
import pathlib
from collections.abc import Callable

from kaleido_jax.errors import UserError

MAX_STEPS = 1_000  # the noise levels of the schedules
MAX_SEED = 2**32 - 1


def add_demo(verbs: argparse._SubParsersAction, name: str) -> argparse.ArgumentParser:
    """`kaleido demo`."""
    parser = add_verb(
        verbs,
        name,
        "train in small, sample, compare with the baseline, write a page",
        """
        kaleido demo                      # minutes on two CPU cores; opens from ./demo/index.html
        kaleido demo --out /tmp/kaleido --quick
        """,
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path("demo"),
        metavar="DIR",
        help="folder to write (default: ./demo)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a few steps of everything: shows that it runs, not that it works",
    )
    parser.add_argument(
        "--seed", type=whole(0, MAX_SEED - 1), default=0, help="of training and sampling"
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="if DIR holds anything but a former demo, rename it instead of refusing",
    )
    return parser


def add_doctor(verbs: argparse._SubParsersAction, name: str) -> argparse.ArgumentParser:
    """`kaleido doctor`."""
    parser = add_verb(
        verbs,
        name,
        "report devices, memory, versions and extras, or the state of a workdir",
        """
        kaleido doctor
        kaleido doctor --workdir runs/shapes    # which checkpoints are whole, what to mend
        """,
    )
    parser.add_argument(
        "--workdir",
        type=pathlib.Path,
        metavar="DIR",
        help="verify the checkpoints of a training run, file by file, instead of the machine",
    )
    return parser


def add_train(verbs: argparse._SubParsersAction, name: str) -> argparse.ArgumentParser:
    """`kaleido train`."""
    parser = add_verb(
        verbs,
        name,
        "train a model by a config; run it again to go on where it stopped",
        """
        kaleido train --config configs/shapes.py --workdir runs/shapes
        kaleido train --config shapes --workdir runs/baseline --config.latents='()'
        kaleido train --config cifar10 --dry-run --config.train.batch_size=64
        kaleido train --config cc12m_256 --dry-run --simulate-devices 64

        --config.a.b=VALUE sets one field of the config; --dry-run prints them all, and parameters,
        operations and memory as the compiler plans it.
        """,
    )
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE|NAME",
        help="a config file, or the name of an installed one",
    )
    parser.add_argument(
        "--workdir",
        type=pathlib.Path,
        metavar="DIR",
        help="folder for checkpoints, metrics and sample grids",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check the config, print it resolved and what it takes, train nothing",
    )
    parser.add_argument(
        "--simulate-devices",
        type=whole(1, 65536),
        metavar="N",
        help="dry run: as on N devices of the machine that will train",
    )
    parser.add_argument(
        "--every-parameter", action="store_true", help="dry run: a line for each array"
    )
    parser.add_argument(
        "--no-compile", action="store_true", help="dry run: leave out the compiler's memory plan"
    )
    parser.add_argument("--json", action="store_true", help="dry run: one JSON object on stdout")
    parser.add_argument(
        "--allow-config-change",
        action="store_true",
        help="go on in a workdir that another config made; the differences are shown",
    )
    parser.add_argument(
        "--start-anew",
        action="store_true",
        help="start at step 0 where every checkpoint of the workdir is damaged",
    )
    return parser


def whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """An argparse type: whole numbers in [low, high]."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or value < low or (high is not None and value > high):
            limits = f"at least {low}" if high is None else f"{low} to {high}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of {limits}")
        return value

    return read


def number(
    low: float = -math.inf, high: float = math.inf, open_below: bool = False
) -> Callable[[str], float]:
    """An argparse type: finite numbers in [low, high], or (low, high] if `open_below`."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or not low <= value <= high or (open_below and value == low):
            limits = "" if low == -math.inf else f" {'over' if open_below else 'from'} {low:g}"
            limits += "" if high == math.inf else f" to {high:g}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a finite number{limits}")
        return value

    return read


def add_setting(parser: argparse.ArgumentParser) -> None:
    """`--setting NAME=VALUE`, read into a list of pairs."""
    parser.add_argument(
        "--setting",
        type=setting,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any sampling setting of docs/sampling.md; may be given several times",
    )


def setting(text: str) -> tuple[str, str | list[str]]:
    """An argparse type: NAME=VALUE, where commas make a list (guidance_interval=0.3,0.85)."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value.split(",") if "," in value else value


def need_folder(path: pathlib.Path, flag: str) -> None:
    """Refuses a path that is not a folder; raises UserError."""
    if not path.exists():
        raise UserError(f"{flag}: there is no folder {path}")
    if not path.is_dir():
        raise UserError(f"{flag}: {path} is a file; a folder is needed")


def add_verb(
    verbs: argparse._SubParsersAction, name: str, summary: str, examples: str
) -> argparse.ArgumentParser:
    """A verb's parser with its one-line summary and its examples."""
    lines = [line.removeprefix(" " * 8) for line in examples.strip("\n").rstrip().split("\n")]
    return verbs.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog="\n".join(["examples:", *(f"  {line}".rstrip() for line in lines)]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
