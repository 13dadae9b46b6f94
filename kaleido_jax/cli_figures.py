"""`kaleido figures`: its arguments and what it runs."""

from __future__ import annotations

import argparse
import pathlib
import sys
from typing import Any

from kaleido_jax import cli_arguments as arguments
from kaleido_jax.cli_evaluate import data_changes, several
from kaleido_jax.errors import UserError

KINDS = ("toy", "guidance", "steps", "table", "diversity", "control", "editing", "noise")
# What each figure reads besides --out and --seed.
TAKES = {
    "toy": ("quick",),
    "guidance": ("results", "metrics"),
    "steps": ("results", "metrics"),
    "table": ("results", "metrics"),
    "diversity": ("checkpoint", "baseline", "prompt", "guidance", "setting"),
    "control": ("checkpoint", "prompt", "num", "setting"),
    "editing": ("checkpoint", "prompt", "document", "script", "setting"),
    "noise": ("checkpoint", "metrics", "samples", "data"),
}


def add_figures(verbs: argparse._SubParsersAction, name: str) -> argparse.ArgumentParser:
    """`kaleido figures`."""
    parser = arguments.add_verb(
        verbs,
        name,
        "draw a figure of the paper from your models, with its numbers as CSV",
        """
        kaleido figures toy                       # Figure 3: trains two small models, minutes
        kaleido figures guidance --results evaluation/results.jsonl                  # Figure 5
        kaleido figures guidance --results evaluation/results.jsonl --metrics fid,recall_3,tv
        kaleido figures steps --results evaluation/results.jsonl --metrics box_iou,hue
        kaleido figures table --results evaluation/results.jsonl --metrics fid,recall_3
        kaleido figures diversity --checkpoint runs/k --baseline runs/b      # Figures 1 and 7
        kaleido figures control --checkpoint runs/k                                 # Figure 6
        kaleido figures editing --checkpoint runs/k                          # Figures 8 and 14
        kaleido figures editing --checkpoint runs/k --document out/000000.png --script edits.jsonl
        kaleido figures noise --checkpoint runs/k --metrics box_iou,shape

        Writes NAME.svg, NAME.png and NAME.csv into the folder; files of these names are replaced.
        `table` writes table.md and table.csv and prints the former; `steps` is over training steps;
        `noise` says at which noise the condition is read, and at which a picture is lost.
        """,
    )
    parser.add_argument("kind", choices=KINDS, metavar="|".join(KINDS), help="which figure")
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path("figures"),
        metavar="DIR",
        help="folder to write into (default: ./figures)",
    )
    parser.add_argument("--seed", type=arguments.whole(0, arguments.MAX_SEED - 1), default=0)
    parser.add_argument("--checkpoint", type=pathlib.Path, metavar="DIR", help="the model")
    parser.add_argument(
        "--baseline", type=pathlib.Path, metavar="DIR", help="diversity: the model without latents"
    )
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT", help="a caption; several may be"
    )
    parser.add_argument(
        "--guidance",
        type=several(arguments.number(0.0, 100.0)),
        metavar="G,G",
        help="diversity: weights (default: 1,2,4,8)",
    )
    parser.add_argument(
        "--setting",
        type=arguments.setting,
        action="append",
        metavar="NAME=VALUE",
        help="a sampling setting of docs/sampling.md; several may be",
    )
    parser.add_argument(
        "--num",
        type=arguments.whole(1, 16),
        metavar="N",
        help="control: pictures of each caption (default: 4)",
    )
    parser.add_argument(
        "--results",
        type=pathlib.Path,
        action="append",
        metavar="FILE",
        help="guidance, steps, table: results of `kaleido evaluate`; several may be",
    )
    parser.add_argument(
        "--metrics",
        type=several(str),
        metavar="A,B",
        help="of these: keys of the results' metrics or adherence (default: fid,recall_3);"
        " noise: of what its detectors see (default: all but angles, backgrounds and successes)",
    )
    parser.add_argument(
        "--samples",
        type=arguments.whole(2, 4096),
        metavar="N",
        help="noise: held-out pictures (default: 128)",
    )
    parser.add_argument(
        "--data",
        type=arguments.setting,
        action="append",
        metavar="NAME=VALUE",
        help="noise: another value of the config's data.source, such as path=SHARDS",
    )
    parser.add_argument(
        "--document", type=pathlib.Path, metavar="FILE", help="editing: a document or picture"
    )
    parser.add_argument(
        "--script",
        type=pathlib.Path,
        metavar="FILE",
        help="editing: as `kaleido edit` has it",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        default=None,
        help="toy: a few steps, which show that it runs and no more",
    )
    return parser


def figures(args: argparse.Namespace) -> None:
    """Draws one figure and says what it wrote."""
    takes = TAKES[args.kind]
    for name in dict.fromkeys(name for names in TAKES.values() for name in names):
        if getattr(args, name) is not None and name not in takes:
            raise UserError(f"figures {args.kind}: --{name} has no meaning for it")
    if "results" in takes and not args.results:
        raise UserError(f"figures {args.kind}: name results with --results FILE")
    for name in ("checkpoint", "baseline"):
        if name in takes:
            if getattr(args, name) is None:
                raise UserError(f"figures {args.kind}: --{name} DIR is needed")
            arguments.need_folder(getattr(args, name), f"--{name}")
    from kaleido_jax.figures import guidance, run

    run.check_writable(args.out)
    if args.kind == "table":
        metrics = args.metrics or guidance.METRICS
        text, paths = run.write_table(args.out, args.results, metrics)
        print(text)
    else:
        paths = run.write(args.out, args.kind, _draw(args))
    for path in paths:
        print(path)


def _draw(args: argparse.Namespace) -> Any:
    from kaleido_jax.figures import guidance, pictures, run

    settings = dict(args.setting or ())
    if args.kind == "toy":
        return run.toy(bool(args.quick), args.seed, _say)
    if args.kind in ("guidance", "steps"):
        along = "step" if args.kind == "steps" else "guidance"
        return run.curves(args.results, args.metrics or guidance.METRICS, along)
    if args.kind == "noise":
        count, changes = args.samples or 128, data_changes(args.data or ())
        return run.over_noise(args.checkpoint, args.metrics, count, args.seed, changes, _say)
    models = {"baseline": args.baseline} if args.kind == "diversity" else {}
    pipes = run.open_pipes({**models, "kaleido": args.checkpoint})
    pipe = pipes["kaleido"]
    if args.kind == "editing":
        return run.edits(pipe, args.document, args.script, args.prompt, args.seed, settings)
    captions = run.captions_for(pipe, args.prompt)
    if args.kind == "control":
        return pictures.control(pipe, captions, args.num or 4, args.seed, settings)
    weights = args.guidance or (1.0, 2.0, 4.0, 8.0)
    return pictures.diversity(pipes, captions, weights, args.seed, settings)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
