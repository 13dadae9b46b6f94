"""`kaleido evaluate`: its arguments and what it runs."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Callable, Iterable
from typing import Any

from kaleido_jax import cli_arguments as arguments
from kaleido_jax.errors import UserError

PROTOCOLS = ("quick", "adm", "paper")


def add_evaluate(verbs: argparse._SubParsersAction, name: str) -> argparse.ArgumentParser:
    """`kaleido evaluate`."""
    parser = arguments.add_verb(
        verbs,
        name,
        "sample many pictures and measure them against the data and their latents",
        """
        kaleido evaluate --checkpoint runs/shapes --out runs/evaluation
        kaleido evaluate --checkpoint runs/shapes --guidance 1,2,4,8 --seeds 0,1,2 --ceiling
        kaleido evaluate --checkpoint runs/shapes --metrics fid,recall,adherence --samples 5000
        kaleido evaluate --checkpoint runs/big --protocol adm --feature inception:weights/inception
        kaleido evaluate --checkpoint runs/big --protocol paper --feature random --shard 0/4

        Each model, guidance weight and seed is a JSON line in OUT/results.jsonl. What was stopped
        goes on where it stopped, with the same figures. docs/evaluation.md explains the metrics.
        """,
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=pathlib.Path,
        metavar="DIR",
        help="workdir, checkpoint or export to evaluate",
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path("evaluation"),
        metavar="DIR",
        help="pictures, references and results; may hold other evaluations (default: ./evaluation)",
    )
    parser.add_argument("--name", default="", help="of the model in results and figures")
    parser.add_argument("--protocol", choices=PROTOCOLS, default="quick", help="default: quick")
    for flag, text in (
        ("--samples", "pictures to draw"),
        ("--references", "training pictures to compare with; 0 is all"),
        ("--neighbours", "of these, how many for precision, recall, density, coverage; 0 is all"),
        ("--bootstrap", "resamples of each interval"),
    ):
        least = 0 if flag in ("--references", "--neighbours") else 1
        parser.add_argument(flag, type=arguments.whole(least), metavar="N", help=text)
    parser.add_argument(
        "--guidance",
        type=several(arguments.number(0.0, 100.0)),
        default=(),
        metavar="G,G",
        help="guidance weights, one after another",
    )
    parser.add_argument(
        "--seeds",
        type=several(arguments.whole(0, arguments.MAX_SEED)),
        default=(0,),
        metavar="K,K",
        help="seeds of sampling, one after another (default: 0)",
    )
    parser.add_argument("--sampler", metavar="NAME", help="ddpm, ddim, dpmpp or heun")
    parser.add_argument("--steps", type=arguments.whole(1, arguments.MAX_STEPS), metavar="S")
    arguments.add_setting(parser)
    parser.add_argument(
        "--data",
        type=arguments.setting,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="another value of the config's data.source, such as path=SHARDS",
    )
    parser.add_argument(
        "--held-out",
        type=arguments.setting,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="the same for captions and true pictures alone, such as split=validation",
    )
    parser.add_argument(
        "--feature", default="", metavar="NAME", help="inception:DIR, shapes, random or pixels"
    )
    parser.add_argument(
        "--metrics",
        type=several(str),
        metavar="A,B",
        help="fid, precision, recall, density, coverage, is, vendi, similarity, adherence, tv",
    )
    parser.add_argument(
        "--detector",
        action="append",
        metavar="NAME",
        help="for adherence: shapes, patch, or an engine of `kaleido annotate` such as hf:MODEL",
    )
    parser.add_argument(
        "--per-caption", type=arguments.whole(1), default=1, metavar="N", help="pictures of each"
    )
    parser.add_argument(
        "--per-latent",
        type=arguments.whole(1),
        default=1,
        metavar="N",
        help="of the pictures of a caption, how many share a z",
    )
    parser.add_argument(
        "--true-latents",
        action="store_true",
        help="paint the held-out pictures' own z, so that only the painting is measured",
    )
    parser.add_argument(
        "--batch-size", type=arguments.whole(1, 10_000), default=50, metavar="B", help="default: 50"
    )
    parser.add_argument(
        "--shard", type=_shard, metavar="I/N", help="make every N-th part of the pictures only"
    )
    parser.add_argument(
        "--ceiling", action="store_true", help="also measure true pictures in the model's place"
    )
    parser.add_argument(
        "--theory",
        action="store_true",
        help="shapes: also what ideal guidance without z would draw",
    )
    parser.add_argument(
        "--ideal-only",
        action="store_true",
        help="only --ceiling and --theory, no model",
    )
    return parser


def evaluate(args: argparse.Namespace) -> None:
    """Evaluates and prints a line for each result."""
    arguments.need_folder(args.checkpoint, "--checkpoint")
    name = args.name or _name_of(args.checkpoint.resolve())
    if name in ("truth", "theory"):
        raise UserError(
            f"--name {name}: that is what figures call pictures of no model; give another"
        )
    if name.startswith("_"):
        raise UserError(f"--name {name}: figures leave out names that begin with _; give another")
    if args.ideal_only and not (args.ceiling or args.theory):
        raise UserError("evaluate: --ideal-only needs --ceiling, --theory or both")
    import jax

    from kaleido_jax.evaluate import run
    from kaleido_jax.evaluate.protocols import PROTOCOLS as protocols

    sizes = ("samples", "references", "neighbours", "bootstrap")
    changes = {n: getattr(args, n) for n in sizes if getattr(args, n) is not None}
    protocol = dataclasses.replace(protocols[args.protocol], **changes)
    if protocol.references:
        fewer = min(protocol.neighbours or protocol.references, protocol.references)
        protocol = dataclasses.replace(protocol, neighbours=fewer)
    changed = "" if protocol == protocols[args.protocol] else ", changed"
    given = {"num_steps": args.steps, "sampler": args.sampler}
    settings = {name: value for name, value in given.items() if value is not None}
    request = run.Request(
        checkpoint=args.checkpoint,
        out=args.out,
        name=name,
        protocol=protocol,
        protocol_name=args.protocol + changed,
        guidance=args.guidance,
        seeds=args.seeds,
        settings=settings | dict(args.setting),
        data=data_changes(args.data),
        held_out=data_changes(args.held_out),
        feature=args.feature,
        metrics=args.metrics,
        detectors=None if args.detector is None else tuple(args.detector),
        per_caption=args.per_caption,
        per_latent=args.per_latent,
        true_latents=args.true_latents,
        batch_size=args.batch_size,
        shard=args.shard or (jax.process_index(), jax.process_count()),
        ceiling=args.ceiling,
        theory=args.theory,
        model=not args.ideal_only,
    )
    for result in run.run(request, lambda line: print(line, file=sys.stderr, flush=True)):
        print(_line(result))
    print(f"results: {args.out / 'results.jsonl'}")


def _line(result: dict[str, Any]) -> str:
    """One line of figures for people."""
    weight = result["guidance_weight"]
    of = result["name"] or result["subject"]
    where = "" if weight is None else f" guidance {weight:g}"
    values = {**result["metrics"], **result["adherence"]}
    figures = [f"{k} {v['value']:.4g}" for k, v in values.items() if v["value"] is not None]
    return f"{of}{where} seed {result['seed']}: {', '.join(figures)}"


def _name_of(folder: pathlib.Path) -> str:
    """A model's name, the same for all steps of its run."""
    run = folder.parent.name == "checkpoints" and folder.name.startswith("step_")
    return (folder.parent.parent if run else folder).name


def data_changes(settings: Iterable[tuple[str, str | list[str]]]) -> dict[str, str]:
    """The values of --data by name, as they were written."""
    return {n: v if isinstance(v, str) else ",".join(v) for n, v in settings}


def several(kind: Callable[[str], Any]) -> Callable[[str], tuple]:
    """An argparse type: values of a kind with commas between them, none twice."""

    def read(text: str) -> tuple:
        values = tuple(kind(word) for word in text.split(","))
        if len(set(values)) < len(values):
            raise argparse.ArgumentTypeError(f"{text!r} names a value twice")
        return values

    return read


def _shard(text: str) -> tuple[int, int]:
    """An argparse type: I/N with 0 <= I < N."""
    first, slash, second = text.partition("/")
    if not (slash and first.isdigit() and second.isdigit() and int(first) < int(second)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N, such as 0/4 to 3/4")
    return int(first), int(second)
