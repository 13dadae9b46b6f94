"""`kaleido tasks` and `kaleido bench data`: what data there are, and how fast they are read."""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import sys
from typing import TYPE_CHECKING

from kaleido_jax import beside
from kaleido_jax import cli_arguments as arguments
from kaleido_jax.errors import UserError

if TYPE_CHECKING:
    from kaleido_jax.data.peek import Peek
    from kaleido_jax.data.task_table import TaskSpec
    from kaleido_jax.tokens import Vocabulary

_LAST_START = 10**12  # numbers of positions stay within 64 bits, whatever the mixture


def add_tasks(verbs: argparse._SubParsersAction, name: str) -> argparse.ArgumentParser:
    """`kaleido tasks`."""
    parser = arguments.add_verb(
        verbs,
        name,
        "list the tasks that name data and latents, or look into one",
        """
        kaleido tasks                                      # all of them, and which are built
        kaleido tasks --match coco100 --data-dir records
        kaleido tasks coco100_64_combined --data-dir records --out peek
        kaleido tasks cc12m_256_mixture --out peek --num 32 --vocabulary spiece.model

        With a name: draws the first examples of its stream into --out, as the model will see
        them: read back from the ids.
        """,
    )
    parser.add_argument("task", nargs="?", metavar="NAME", help="the task or mixture to look into")
    parser.add_argument(
        "--match", default="", metavar="TEXT", help="list only names that hold this text"
    )
    parser.add_argument(
        "--data-dir",
        default="",
        metavar="DIR",
        help="folder of records (default: TFDS_DATA_DIR, else TFDS's own)",
    )
    parser.add_argument("--out", type=pathlib.Path, metavar="DIR", help="new or empty folder")
    parser.add_argument(
        "--num",
        type=arguments.whole(1, 1000),
        default=8,
        metavar="N",
        help="examples to draw (default: 8)",
    )
    parser.add_argument("--split", default="train", help="of the data set (default: train)")
    parser.add_argument(
        "--seed", type=arguments.whole(0, arguments.MAX_SEED), default=0, help="of the order"
    )
    parser.add_argument(
        "--in-order", action="store_true", help="the order of the files, not shuffled"
    )
    parser.add_argument(
        "--start",
        type=arguments.whole(0, _LAST_START),
        default=0,
        metavar="N",
        help="examples to leave out",
    )
    parser.add_argument(
        "--vocabulary",
        metavar="FILE",
        help="SentencePiece model, T5's for example (default: the shipped one)",
    )
    return parser


def tasks(args: argparse.Namespace) -> None:
    """Lists the tasks, or draws examples of one."""
    if args.task is None:
        if args.out is not None:
            raise UserError("tasks: --out needs the NAME of a task to look into")
        print(listing(args.match, args.data_dir))
        return
    if args.out is None:
        raise UserError(f"tasks {args.task}: --out DIR is needed for the pictures")
    from kaleido_jax import outputs

    outputs.check_folder(args.out)
    draw(args, _vocabulary(args))


def _vocabulary(args: argparse.Namespace) -> Vocabulary:
    from kaleido_jax.data.task_table import NUM_VOKENS
    from kaleido_jax.tokens import Vocabulary

    if args.vocabulary:
        return Vocabulary.from_file(args.vocabulary, NUM_VOKENS)
    return Vocabulary.default(NUM_VOKENS)


def listing(match: str, data_dir: str) -> str:
    """The table of tasks and mixtures, one line each."""
    from kaleido_jax.data import task_table

    built: dict[tuple[str, int], str] = {}
    specs = [*task_table.TASKS.values(), *task_table.MIXTURES.values()]
    specs = sorted(
        (spec for spec in specs if match in spec.name), key=lambda s: (s.name.split("_")[0], s.size)
    )
    if not specs:
        raise UserError(f"no task holds {match!r} in its name")
    lines = [f"{'task':<24}{'pixels':>7}{'tokens':>8}  {'latents':<26}records"]
    for spec in specs:
        part = spec.tasks[0] if isinstance(spec, task_table.MixtureSpec) else spec
        place = (part.records, part.size)
        if place not in built:
            built[place] = _built(part, data_dir)
        lines.append(
            f"{spec.name:<24}{spec.size:>7}{spec.latent_length:>8}  "
            f"{' '.join(spec.latents):<26}{built[place]}"
        )
    folder = task_table.data_folder(data_dir)
    lines.append(f"data folder: {folder} (`kaleido build` fills it)")
    return "\n".join(lines)


def _built(spec: TaskSpec, data_dir: str) -> str:
    """How many records a task finds, by split."""
    from kaleido_jax.data import task_table

    if not (task_table.data_folder(data_dir) / spec.records).is_dir():
        return "not built"
    try:
        counts = task_table.splits(spec, data_dir)
    except UserError:
        return "cannot be read"  # a look into the task says why
    return ", ".join(f"{n:,} {split}" for split, n in counts.items())


def draw(args: argparse.Namespace, vocabulary: Vocabulary) -> None:
    """Writes one PNG for each example, and examples.jsonl beside them.

    Raises:
      UserError: no such task or records, a folder that cannot be written.
    """
    from kaleido_jax.data.peek import peek

    examples = peek(
        args.task,
        vocabulary,
        args.num,
        args.data_dir,
        args.split,
        args.seed,
        not args.in_order,
        args.start,
    )
    lines = []
    try:
        with beside.new_folder(args.out.resolve()) as folder:
            for number, example in enumerate(examples):
                lines.append(_write(folder, number, example))
            (folder / "examples.jsonl").write_text("".join(lines), "utf-8")
    except BrokenPipeError:  # of what is printed
        raise
    except OSError as error:
        raise UserError(f"{args.out} cannot be written: {error.strerror or error}") from error
    print(f"{len(lines)} pictures and examples.jsonl: {args.out}")


def _write(folder: pathlib.Path, number: int, example: Peek) -> str:
    """Draws one example; returns its line of examples.jsonl."""
    from PIL import Image

    name = f"{number:03d}_{re.sub(r'[^A-Za-z0-9._-]+', '_', example.key)[:80]}.png"
    Image.fromarray(example.picture).save(folder / name)
    print(f"{name}: {example.caption_tokens} + {example.latent_tokens} tokens: {example.caption}")
    said = {
        "picture": name,
        "key": example.key,
        "caption": example.caption,
        "latents": example.latents,
        "caption_tokens": example.caption_tokens,
        "latent_tokens": example.latent_tokens,
        "unknown_tokens": example.unknown,
    }
    return json.dumps(said, ensure_ascii=False) + "\n"


def add_bench_data(verbs: argparse._SubParsersAction, name: str) -> argparse.ArgumentParser:
    """`kaleido bench data`."""
    parser = arguments.add_verb(
        verbs,
        name,
        "measure the loader: images a second, time to the first batch and to resume",
        """
        kaleido bench data                             # drawn records, 64 and 256 pixels
        kaleido bench data --task cc12m_256_combined --data-dir records --seconds 20
        kaleido bench data --size 256 --workers 4 --batch-size 512 >> bench.jsonl

        Prints one JSON object a line.
        """,
    )
    parser.add_argument(
        "--size",
        type=arguments.whole(32, 1024),
        action="append",
        metavar="PIXELS",
        help="side of the drawn records; may be given several times (default: 64 and 256)",
    )
    parser.add_argument("--task", metavar="NAME", help="measure these records instead")
    parser.add_argument("--data-dir", default="", metavar="DIR", help="folder of records")
    parser.add_argument("--split", default="train", help="of the data set (default: train)")
    parser.add_argument(
        "--seconds",
        type=arguments.number(0.0, 3600.0, open_below=True),
        default=5.0,
        help="how long to measure each (default: 5)",
    )
    parser.add_argument("--batch-size", type=arguments.whole(1, 65536), default=64, metavar="B")
    parser.add_argument(
        "--workers",
        type=arguments.whole(0, 256),
        default=0,
        metavar="N",
        help="threads (default: one for each core)",
    )
    parser.add_argument(
        "--records",
        type=arguments.whole(1, 100_000),
        default=512,
        metavar="N",
        help="records to draw for each size (default: 512)",
    )
    parser.add_argument(
        "--vocabulary",
        metavar="FILE",
        help="SentencePiece model, T5's for example (default: the shipped one)",
    )
    return parser


def bench_data(args: argparse.Namespace) -> None:
    """Prints a JSON line for each size, or for the task."""
    from kaleido_jax.bench import data as bench

    if args.task and args.size:
        raise UserError("bench data: --size is for drawn records; a task has its own")
    vocabulary = _vocabulary(args)
    settings = bench.Settings(args.seconds, args.batch_size, args.workers)
    if args.task:
        print(json.dumps(bench.task(args.task, args.data_dir, args.split, vocabulary, settings)))
        return
    for size in args.size or [64, 256]:
        print(f"kaleido: {size} pixels: drawing {args.records} records", file=sys.stderr)
        print(json.dumps(bench.drawn(size, args.records, vocabulary, settings)), flush=True)
