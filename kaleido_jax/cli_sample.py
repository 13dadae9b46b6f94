"""`kaleido sample`: its arguments and what it runs; the cache of compiled programs."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import pathlib
import sys
import time
from typing import TYPE_CHECKING, Any

from kaleido_jax import cli_arguments as arguments

if TYPE_CHECKING:
    from kaleido_jax.generate import Pipeline
    from kaleido_jax.prompts import Request

_TELL_EVERY = 5.0  # seconds between lines of progress


def add_sample(verbs: argparse._SubParsersAction, name: str) -> argparse.ArgumentParser:
    """`kaleido sample`."""
    parser = arguments.add_verb(
        verbs,
        name,
        "draw latents and pictures for prompts",
        """
        kaleido sample --checkpoint runs/shapes --prompt "dawn: a red shape" --out out
        kaleido sample --checkpoint runs/shapes --prompts prompts.txt --num 8 --guidance 4
        kaleido sample --checkpoint runs/shapes --prompt "a shape" --sampler dpmpp --steps 20
        kaleido sample --checkpoint runs/shapes --prompt "a shape" --setting guidance=apg

        kaleido sample --checkpoint runs/shapes --prompts prompts.jsonl --out many --resume

        A prompt file is UTF-8 text with one prompt a line, or .jsonl with a line for each prompt,
        {"caption": "...", "num": 4, "seed": 7, "guidance": 3, "settings": {}}, where all but the
        caption may be missing, or a whole document to draw again. What is not given is taken from
        the checkpoint's config. docs/sampling.md explains more.
        """,
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=pathlib.Path,
        metavar="DIR",
        help="workdir, checkpoint or export to sample from",
    )
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument(
        "--prompt", action="append", metavar="TEXT", help="a caption; may be given several times"
    )
    prompts.add_argument("--prompts", type=pathlib.Path, metavar="FILE", help="a file of captions")
    parser.add_argument(
        "--num",
        type=arguments.whole(1),
        default=16,
        metavar="N",
        help="pictures for each prompt (default: 16)",
    )
    parser.add_argument(
        "--guidance",
        type=arguments.number(0.0, 100.0),
        metavar="G",
        help="guidance weight; 1 is none, 0 the unconditional model",
    )
    parser.add_argument(
        "--steps",
        type=arguments.whole(1, arguments.MAX_STEPS),
        metavar="S",
        help=f"denoising steps, 1 to {arguments.MAX_STEPS}",
    )
    parser.add_argument("--sampler", metavar="NAME", help="ddpm, ddim, dpmpp or heun")
    parser.add_argument(
        "--seed",
        type=arguments.whole(0, arguments.MAX_SEED),
        default=0,
        metavar="K",
        help="picture i of a prompt depends on the seed and i (default: 0)",
    )
    parser.add_argument(
        "--temperature",
        type=arguments.number(0.0, 100.0),
        metavar="T",
        help="of the latents; 0 takes the most probable token",
    )
    parser.add_argument(
        "--top-k",
        type=arguments.whole(0),
        metavar="K",
        help="latent tokens only from the K most probable; 0 is all",
    )
    parser.add_argument(
        "--top-p",
        type=arguments.number(0.0, 1.0, open_below=True),
        metavar="P",
        help="latent tokens only from the smallest set of probability P",
    )
    parser.add_argument(
        "--unconstrained",
        action="store_true",
        help="let the decoder write what it likes, not only what the latents' grammars hold",
    )
    parser.add_argument(
        "--diverse",
        type=arguments.whole(1),
        metavar="M",
        help="draw M latents for each prompt and keep the N that differ most",
    )
    arguments.add_setting(parser)
    parser.add_argument(
        "--batch-size",
        type=arguments.whole(1),
        metavar="B",
        help="pictures at once; changes memory and speed, not the pictures",
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path("samples"),
        metavar="DIR",
        help="new or empty folder to write (default: ./samples)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on in --out where the same command was stopped; begin where it was not",
    )
    add_cache(parser)
    return parser


def add_cache(parser: argparse.ArgumentParser) -> None:
    """The arguments that `use_cache` reads."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--cache",
        type=pathlib.Path,
        metavar="DIR",
        help="for compiled programs (default: $KALEIDO_CACHE, else ~/.cache/kaleido_jax)",
    )
    group.add_argument(
        "--no-cache", action="store_true", help="compile everything, and keep nothing of it"
    )


def use_cache(args: argparse.Namespace) -> None:
    """Keeps compiled programs on disk unless told otherwise."""
    if args.no_cache:
        return
    from kaleido_jax import compiled

    if compiled.keep(args.cache) is None:
        where = args.cache or "the cache folder"
        print(
            f"kaleido: {where} cannot be written; compiled programs are not kept", file=sys.stderr
        )


def sample(args: argparse.Namespace) -> None:
    """Samples pictures for each prompt and writes them with their latent documents."""
    from kaleido_jax import prompts

    if args.prompts is not None:
        requests = prompts.read_requests(args.prompts)
    else:
        requests = [
            prompts.Request(prompts.clean_prompt(text, "--prompt"), "--prompt")
            for text in args.prompt
        ]
    arguments.need_folder(args.checkpoint, "--checkpoint")
    use_cache(args)

    from kaleido_jax import generate, picture_folder

    picture_folder.check(args.out, args.resume)
    pipe = generate.Pipeline.from_pretrained(args.checkpoint)
    given = _given(args)
    # Refused before the folder is made.
    pipe.stream(requests, args.num, seed=args.seed, batch_size=args.batch_size, **given)
    asked = {
        "prompts_sha256": _digest(requests),
        "num": args.num,
        "seed": args.seed,
        "batch_size": args.batch_size,
        "diverse": args.diverse,
        "settings": dataclasses.asdict(pipe.defaults.replace(given)),
        **pipe.model_hashes,
    }
    with picture_folder.PictureFolder(args.out, asked, args.resume) as folder:
        if folder.finished:
            print(f"nothing to do: {len(folder.done)} pictures are in {args.out}")
            return
        count, together = args.num, len(requests) > 1
        if args.diverse is not None:
            requests, given, count = _diverse(pipe, requests, args, given), {}, 1
        stream = pipe.stream(
            requests,
            count,
            seed=args.seed,
            batch_size=args.batch_size,
            done=folder.done,
            **given,
        )
        total = prompts.count_pictures(requests, count)
        progress = _Progress(total, len(folder.done))
        for numbers, output in stream:
            folder.add(numbers, output)
            progress.tell(len(numbers))
            for warning in output.warnings:
                print(f"kaleido: {warning}", file=sys.stderr)
        even = all(request.num is None and request.document is None for request in requests)
        columns = args.num if together and args.num > 1 and (even or args.diverse) else None
        folder.finish(columns)
    print(f"{total} pictures and their documents: {args.out}")


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling settings that the command line names."""
    given = {
        "guidance_weight": args.guidance,
        "num_steps": args.steps,
        "sampler": args.sampler,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
    }
    given = {name: value for name, value in given.items() if value is not None}
    given |= dict(args.setting)
    if args.unconstrained:
        given["constrained"] = False
    return given


def _diverse(
    pipe: Pipeline, requests: list[Request], args: argparse.Namespace, given: dict[str, Any]
) -> list[Request]:
    """Requests of the documents that differ most, `num` for each prompt."""
    found = []
    for request in requests:
        if request.document is not None:
            found.append(request)
            continue
        documents = pipe.draw_diverse(
            request.caption,
            request.num or args.num,
            args.diverse,
            seed=args.seed if request.seed is None else request.seed,
            batch_size=args.batch_size,
            **{**given, **request.settings},
        )
        found += [dataclasses.replace(request, document=document) for document in documents]
    return found


def _digest(requests: list[Request]) -> str:
    """A hash of all that is asked for, whatever file it came from."""
    total = hashlib.sha256()
    for r in requests:
        document = None if r.document is None else r.document.to_json()
        total.update(
            repr((r.caption, r.num, r.seed, sorted(r.settings.items()), document)).encode()
        )
    return total.hexdigest()


class _Progress:
    """Says on stderr how many pictures there are, and how long the rest will take."""

    def __init__(self, total: int, before: int):
        self._total, self._before, self._done = total, before, 0
        self._began = self._told = time.monotonic()

    def tell(self, count: int) -> None:
        """Counts pictures; a line now and then, and none where all is done at once."""
        self._done += count
        now = time.monotonic()
        there = self._before + self._done
        if now - self._told < _TELL_EVERY or there == self._total:
            return
        self._told = now
        rate = self._done / (now - self._began)
        print(
            f"{there:,} of {self._total:,} pictures, {rate:.1f} a second, about "
            f"{(self._total - there) / rate / 60:.0f} min left",
            file=sys.stderr,
        )
