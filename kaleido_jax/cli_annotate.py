"""`kaleido annotate` and `kaleido annotate fit-vokens`: their arguments and what they run."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from kaleido_jax import cli_arguments as arguments
from kaleido_jax.errors import UserError

STAGES = ("text", "bbox", "blob", "voken")
_DEFAULT_ENGINES = {"text": "oracle", "bbox": "oracle", "blob": "oracle", "voken": "patch:default"}


def add_annotate(verbs: argparse._SubParsersAction, name: str) -> argparse.ArgumentParser:
    """`kaleido annotate`."""
    parser = arguments.add_verb(
        verbs,
        name,
        "write latents for shards of pictures, with engines by name, on Apache Beam",
        """
        kaleido annotate --data SHARDS --out latents --stages text,bbox,blob,voken
        kaleido annotate --data 'cc12m/{00000..01242}.tar' --out latents \\
            --engine.text hf:Qwen/Qwen2.5-VL-3B-Instruct --engine.bbox hf:Qwen/Qwen3-VL-4B-Instruct
        kaleido annotate --data tfds:cifar10/train --out latents --engine.voken patch:default
        kaleido annotate --data SHARDS --out latents --stages bbox -- \\
            --direct_num_workers=4 --direct_running_mode=multi_processing

        Stopped, it goes on with the shards that are not done when the same command is given again.
        Words after -- are Beam's own; launch/annotate.sh has the commands for clusters.
        """,
    )
    parser.add_argument(
        "--data",
        required=True,
        metavar="SHARDS",
        help="a folder, a pattern or a {00000..00009} range of .tar shards, or tfds:NAME/SPLIT",
    )
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="folder of the sidecars, one run at a time"
    )
    parser.add_argument(
        "--stages",
        metavar="A,B",
        help="what to write, of text, bbox, blob and voken (default: those with an engine)",
    )
    for stage in STAGES:
        parser.add_argument(
            f"--engine.{stage}",
            metavar="ENGINE",
            help=f"who writes {stage} (default: {_DEFAULT_ENGINES[stage]})",
        )
        parser.add_argument(
            f"--option.{stage}",
            action="append",
            default=[],
            metavar="NAME=VALUE",
            help=f"a setting of {stage}'s engine, such as batch_size=8",
        )
    parser.add_argument(
        "--seed",
        type=arguments.whole(0, arguments.MAX_SEED),
        default=0,
        help="of engines that draw",
    )
    parser.add_argument(
        "--image-size",
        type=arguments.whole(8, 4096),
        default=512,
        metavar="N",
        help="side of the pictures that engines see, at most (default: 512)",
    )
    parser.add_argument(
        "--max-failure-rate",
        type=arguments.number(0.0, 1.0),
        default=0.02,
        metavar="R",
        help="fail when more of a stage is rejected, failed or lost (default: 0.02)",
    )
    parser.add_argument(
        "--again", action="store_true", help="try the dead letters of finished shards once more"
    )
    parser.add_argument("--data-dir", default="", metavar="DIR", help="folder of TFDS's data sets")
    return parser


def annotate(args: argparse.Namespace) -> int:
    """Annotates and prints the counts of each stage; 1 if a stage failed as a whole."""
    engines, options = engines_of(vars(args))

    from kaleido_jax.annotate import pipeline
    from kaleido_jax.annotate.stages import AnnotationFailed

    settings = pipeline.Run(
        data=args.data,
        out=args.out,
        engines=engines,
        options=options,
        seed=args.seed,
        image_size=args.image_size,
        max_failure_rate=args.max_failure_rate,
        data_dir=args.data_dir,
        again=args.again,
        flags=tuple(args.beam),
    )
    try:
        manifest = pipeline.run(settings)
    except AnnotationFailed as error:
        print(f"kaleido: {error}", file=sys.stderr)
        return 1
    print(table(manifest))
    print(f"sidecars and manifest: {args.out}")
    return 0


def add_fit_vokens(verbs: argparse._SubParsersAction, name: str) -> argparse.ArgumentParser:
    """`kaleido annotate fit-vokens`."""
    parser = arguments.add_verb(
        verbs,
        name,
        "fit a codebook of visual tokens on pictures of shards",
        """
        kaleido annotate fit-vokens --data SHARDS --out vokens.npz
        kaleido annotate fit-vokens --data SHARDS --out siglip.npz --pictures 20000 \\
            --kind kmeans:google/siglip2-base-patch16-224

        Then: kaleido annotate --data SHARDS --out latents --engine.voken patch:vokens.npz
        """,
    )
    parser.add_argument("--data", required=True, metavar="SHARDS", help="as of kaleido annotate")
    parser.add_argument("--out", required=True, metavar="FILE", help="the .npz to write")
    parser.add_argument(
        "--kind",
        default="patch",
        metavar="KIND",
        help="patch (default; no model), fsq (no model), or kmeans:MODEL of SigLIP 2 or DINOv2",
    )
    parser.add_argument(
        "--codes",
        type=arguments.whole(2),
        metavar="N",
        help="default: 1000 of patch, 8192 of kmeans",
    )
    parser.add_argument(
        "--side",
        type=arguments.whole(8, 4096),
        default=224,
        metavar="N",
        help="at which the model of kmeans sees pictures (default: 224)",
    )
    parser.add_argument(
        "--components",
        type=arguments.whole(1, 4096),
        default=32,
        metavar="N",
        help="principal components of a token, but for fsq (default: 32)",
    )
    parser.add_argument(
        "--pictures",
        type=arguments.whole(1),
        default=4000,
        metavar="N",
        help="how many to fit on (default: 4000)",
    )
    parser.add_argument(
        "--seed", type=arguments.whole(0, arguments.MAX_SEED), default=0, help="of the choice"
    )
    parser.add_argument("--data-dir", default="", metavar="DIR", help="folder of TFDS's data sets")
    return parser


def fit_vokens(args: argparse.Namespace) -> None:
    """Fits a codebook and prints the engine that uses it."""
    from rich.console import Console
    from rich.progress import Progress

    from kaleido_jax.annotate import fit_vokens as module

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("pictures read", total=args.pictures)
        engine = module.fit(
            args.kind,
            args.data,
            args.out,
            args.pictures,
            args.codes,
            args.seed,
            args.side,
            args.components,
            data_dir=args.data_dir,
            tell=lambda count: bar.update(task, completed=count),
        )
    print(f"--engine.voken {engine}")


def engines_of(given: dict[str, Any]) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
    """The engine and the options of each stage that is asked for.

    Raises:
      UserError: an unknown stage, none, an option without a value or of a stage not asked for.
    """
    if given["stages"] is None:
        stages = [stage for stage in STAGES if given[f"engine.{stage}"]]
        if not stages:
            raise UserError("annotate: name --stages, for example --stages text,bbox,blob,voken")
    else:
        stages = [word.strip() for word in given["stages"].split(",") if word.strip()]
        for stage in stages:
            if stage not in STAGES:
                raise UserError(f"annotate: no stage {stage!r} (there are {', '.join(STAGES)})")
    engines, options = {}, {}
    for stage in STAGES:
        if stage in stages:
            engines[stage] = given[f"engine.{stage}"] or _DEFAULT_ENGINES[stage]
            options[stage] = dict(
                _option(f"--option.{stage}", word) for word in given[f"option.{stage}"]
            )
        elif given[f"engine.{stage}"] or given[f"option.{stage}"]:
            raise UserError(f"annotate: an engine or option for {stage}, which is not in --stages")
    if not engines:
        raise UserError("annotate: --stages names none")
    return engines, options


def table(manifest: dict[str, Any]) -> str:
    """Counts of every stage, one line each."""
    columns = ["records", *next(iter(manifest["stages"].values()))["counts"], "dead letters"]
    lines = [f"{'stage':<6}" + "".join(f"{name:>14}" for name in columns)]
    for name, stage in manifest["stages"].items():
        dead = sum(done["dead_letters"] for done in stage["shards"].values())
        values = [stage["records"], *stage["counts"].values(), dead]
        lines.append(f"{name:<6}" + "".join(f"{value:>14,}" for value in values))
    return "\n".join(lines)


def _option(flag: str, word: str) -> tuple[str, Any]:
    name, equals, text = word.partition("=")
    if not name or not equals:
        raise UserError(f"{flag}: write NAME=VALUE, not {word!r}")
    if text in ("True", "False"):  # as Python and JSON write them
        return name, text == "True"
    try:
        return name, json.loads(text)
    except (ValueError, RecursionError):
        return name, text  # plain words need no quotes
