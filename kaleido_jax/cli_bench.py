"""`kaleido bench decode`: its arguments and what it runs."""

from __future__ import annotations

import argparse
import json
import pathlib

from kaleido_jax import cli_arguments as arguments
from kaleido_jax.errors import UserError


def add_bench_decode(verbs: argparse._SubParsersAction, name: str) -> argparse.ArgumentParser:
    """`kaleido bench decode`."""
    parser = arguments.add_verb(
        verbs,
        name,
        "measure decoding: tokens a second, and what the grammars' constraint costs",
        """
        kaleido bench decode --config shapes
        kaleido bench decode --checkpoint runs/shapes --batch-size 64
        kaleido bench decode --config base --vocabulary spiece.model >> bench.jsonl

        A config is measured with random weights. Prints one JSON object.
        """,
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--checkpoint", type=pathlib.Path, metavar="DIR", help="a trained model")
    model.add_argument("--config", metavar="NAME", help="a config, with random weights")
    parser.add_argument(
        "--vocabulary",
        type=pathlib.Path,
        metavar="FILE",
        help="SentencePiece model for --config (default: the config's)",
    )
    parser.add_argument(
        "--latents", metavar="A,B", help="latents for --config (default: the config's)"
    )
    parser.add_argument("--batch-size", type=arguments.whole(1, 65536), default=16, metavar="B")
    parser.add_argument(
        "--length",
        type=arguments.whole(2, 65536),
        metavar="N",
        help="tokens to write (default: the config's)",
    )
    parser.add_argument("--repeats", type=arguments.whole(1, 1000), default=5, metavar="R")
    return parser


def bench_decode(args: argparse.Namespace) -> None:
    """Prints the figures as a JSON line."""
    if args.checkpoint is not None:
        arguments.need_folder(args.checkpoint, "--checkpoint")
        if args.vocabulary is not None or args.latents is not None:
            raise UserError("bench decode: a checkpoint has its own vocabulary and latents")

    from kaleido_jax import bundle, config
    from kaleido_jax.bench import decode as bench
    from kaleido_jax.tokens import Vocabulary

    settings = bench.Settings(args.batch_size, args.length or 0, args.repeats)
    if args.checkpoint is not None:
        model = bundle.load(args.checkpoint)
        made = bench.measure(model.config, model.vocabulary, settings, model.params)
    else:
        overrides = [] if args.latents is None else [f"latents={args.latents}"]
        chosen = config.load_config(args.config, overrides)
        vocabulary = (
            bundle.make_vocabulary(chosen)
            if args.vocabulary is None
            else Vocabulary.from_file(args.vocabulary, chosen.vocabulary.num_vokens)
        )
        made = bench.measure(chosen, vocabulary, settings)
    print(json.dumps(made))
