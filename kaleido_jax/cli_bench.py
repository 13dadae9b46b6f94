"""`kaleido bench train|sample|decode`: their arguments and what they run."""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

from kaleido_jax import cli_arguments as arguments
from kaleido_jax.errors import UserError

LARGEST_BATCH = 2**16


def add_bench_train(verbs: argparse._SubParsersAction, name: str) -> argparse.ArgumentParser:
    """`kaleido bench train`."""
    parser = arguments.add_verb(
        verbs,
        name,
        "measure a training step: time, images a second, utilisation, memory",
        """
        kaleido bench train --config shapes
        kaleido bench train --config cc12m_256 --batch-size 8 --sweep --baseline >> bench.jsonl
        kaleido bench train --config shapes --denoiser-only --config.train.batch_size=8

        Data are made up and weights random. Prints one JSON object for each batch size;
        docs/scaling.md says what each figure means.
        """,
    )
    parser.add_argument(
        "--config", required=True, metavar="FILE|NAME", help="what to train; --config.a.b=VALUE"
    )
    parser.add_argument(
        "--denoiser-only",
        action="store_true",
        help="the denoiser alone with Adam: no text, no average of parameters",
    )
    parser.add_argument(
        "--baseline",
        action="store_true",
        help="measure the same batch without latents too, and compare times with operations",
    )
    _add_common(parser, None, 10)
    parser.add_argument(
        "--warmup",
        type=arguments.whole(1, 1000),
        default=2,
        metavar="W",
        help="steps before the first that is timed (default: 2)",
    )
    return parser


def bench_train(args: argparse.Namespace) -> None:
    """Prints a JSON line for each batch size."""
    from kaleido_jax import config
    from kaleido_jax.bench import training

    chosen = config.load_config(args.config, args.overrides)

    def measure(size: int) -> dict[str, Any]:
        return training.measure(
            chosen,
            training.Settings(
                batch_size=size,
                repeats=args.repeats,
                warmup=args.warmup,
                denoiser_only=args.denoiser_only,
                baseline=args.baseline,
                memory_limit=_limit(args),
                profile=args.profile,
            ),
        )

    _print(args, "train", measure, args.batch_size or chosen.train.batch_size)


def add_bench_decode(verbs: argparse._SubParsersAction, name: str) -> argparse.ArgumentParser:
    """`kaleido bench decode`."""
    parser = arguments.add_verb(
        verbs,
        name,
        "measure decoding: tokens a second, and what the grammars' constraint costs",
        """
        kaleido bench decode --config shapes
        kaleido bench decode --checkpoint runs/shapes --batch-size 64
        kaleido bench decode --config base --vocabulary spiece.model --sweep >> bench.jsonl

        A config is measured with random weights. Prints one JSON object for each batch size.
        """,
    )
    _add_model(parser)
    parser.add_argument(
        "--length",
        type=arguments.whole(2, 65536),
        metavar="N",
        help="tokens to write (default: the config's)",
    )
    _add_common(parser, 16, 5)
    return parser


def bench_decode(args: argparse.Namespace) -> None:
    """Prints a JSON line for each batch size."""
    chosen, vocabulary, params = _model(args, "decode")

    from kaleido_jax.bench import decode

    def measure(size: int) -> dict[str, Any]:
        settings = decode.Settings(size, args.length or 0, args.repeats, _limit(args), args.profile)
        return decode.measure(chosen, vocabulary, settings, params)

    _print(args, "decode", measure, args.batch_size)


def add_bench_sample(verbs: argparse._SubParsersAction, name: str) -> argparse.ArgumentParser:
    """`kaleido bench sample`."""
    parser = arguments.add_verb(
        verbs,
        name,
        "measure sampling: images a second, share of decoding and diffusion, writing included",
        """
        kaleido bench sample --config shapes
        kaleido bench sample --checkpoint runs/shapes --batch-size 4 --sweep --largest 64
        kaleido bench sample --config cc12m_256 --setting sampler=dpmpp --setting num_steps=20

        A config is measured with random weights. Prints one JSON object for each batch size.
        """,
    )
    _add_model(parser)
    arguments.add_setting(parser)
    _add_common(parser, 16, 3)
    return parser


def bench_sample(args: argparse.Namespace) -> None:
    """Prints a JSON line for each batch size."""
    chosen, vocabulary, params = _model(args, "sample")

    from kaleido_jax.bench import sampling
    from kaleido_jax.bundle import Bundle

    model = (
        sampling.random_bundle(chosen, vocabulary)
        if params is None
        else Bundle(chosen, params, vocabulary, "bench")
    )

    def measure(size: int) -> dict[str, Any]:
        settings = sampling.Settings(
            size, args.repeats, dict(args.setting), _limit(args), args.profile
        )
        return sampling.measure(model, settings)

    _print(args, "sample", measure, args.batch_size)


def _add_model(parser: argparse.ArgumentParser) -> None:
    """The arguments that `_model` reads."""
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


def _model(args: argparse.Namespace, verb: str) -> tuple[Any, Any, Any]:
    """(config, vocabulary, parameters or None where they are to be random)."""
    if args.checkpoint is not None:
        arguments.need_folder(args.checkpoint, "--checkpoint")
        if args.vocabulary is not None or args.latents is not None:
            raise UserError(f"bench {verb}: a checkpoint has its own vocabulary and latents")

    from kaleido_jax import bundle, config
    from kaleido_jax.tokens import Vocabulary

    if args.checkpoint is not None:
        model = bundle.load(args.checkpoint)
        return model.config, model.vocabulary, model.params
    overrides = [] if args.latents is None else [f"latents={args.latents}"]
    chosen = config.load_config(args.config, overrides)
    if args.vocabulary is None:
        return chosen, bundle.make_vocabulary(chosen), None
    return chosen, Vocabulary.from_file(args.vocabulary, chosen.vocabulary.num_vokens), None


def _add_common(parser: argparse.ArgumentParser, batch: int | None, repeats: int) -> None:
    """The arguments that all of them have; `batch` None is the config's."""
    parser.add_argument(
        "--batch-size",
        type=arguments.whole(1, LARGEST_BATCH),
        default=batch,
        metavar="B",
        help=f"rows of a batch (default: {batch or 'the config'})",
    )
    parser.add_argument(
        "--sweep",
        action="store_true",
        help="then twice as many, and so on, to the largest that fits into memory",
    )
    parser.add_argument(
        "--largest",
        type=arguments.whole(1, LARGEST_BATCH),
        default=LARGEST_BATCH,
        metavar="B",
        help="where the sweep ends even if more would fit",
    )
    parser.add_argument(
        "--memory",
        type=arguments.number(0.0, open_below=True),
        metavar="GIB",
        help="do not run what the compiler says needs more (default: on a CPU what is free)",
    )
    parser.add_argument(
        "--repeats",
        type=arguments.whole(1, 1000),
        default=repeats,
        metavar="R",
        help=f"how often each is timed; the median counts (default: {repeats})",
    )
    parser.add_argument(
        "--profile",
        type=pathlib.Path,
        metavar="DIR",
        help="write a trace of the timed part, for TensorBoard or Perfetto",
    )


def _limit(args: argparse.Namespace) -> int:
    from kaleido_jax.bench import measured

    return measured.memory_limit() if args.memory is None else int(args.memory * 2**30)


def _print(
    args: argparse.Namespace, bench: str, measure: Callable[[int], dict[str, Any]], first: int
) -> None:
    """A JSON line for the first batch size, or for those of a sweep."""
    from kaleido_jax.bench import measured

    named = args.config or str(args.checkpoint)
    about = {"bench": bench, "config": named}
    last = max(first, args.largest) if args.sweep else first
    largest = None
    for made in measured.sweep(measure, first, last, about):
        print(json.dumps({**about, **made}), flush=True)
        if made["fits"]:
            largest = made["batch_size"]
            print(f"kaleido: bench {bench}: batch of {largest} done", file=sys.stderr)
    if args.sweep:
        print(f"kaleido: bench {bench}: the largest batch was {largest}", file=sys.stderr)
