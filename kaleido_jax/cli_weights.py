"""`kaleido import` and `kaleido export`: their arguments and what they run."""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kaleido_jax import cli_arguments as arguments
from kaleido_jax.errors import UserError

KINDS = ("mdm", "t5", "t5x", "inception")
FORMATS = ("safetensors", "stablehlo", "mdm", "t5")
DTYPES = ("float32", "bfloat16", "float16")
MAX_VOKENS = 1_000_000


def add_import(verbs: argparse._SubParsersAction, name: str) -> argparse.ArgumentParser:
    """`kaleido import`."""
    parser = arguments.add_verb(
        verbs,
        name,
        "turn public weights into a folder that kaleido trains from and samples",
        """
        kaleido import t5 flan-t5-xl weights/flan              # a Hugging Face folder
        kaleido import t5 t5-v1_1-xl weights/t5 --vokens 8192  # room for vokens and sections
        kaleido import t5x checkpoint_1000000 weights/t5 --tokenizer spiece.model
        kaleido import mdm vis_model.pth weights/mdm64 --text-encoder weights/flan
        kaleido import inception weights-inception-2015-12-05-6d7a9d5b.pth weights/inception
        kaleido sample --checkpoint weights/mdm64 --prompt "a cat on a mat"
        kaleido train --config base --workdir run --config.init_from=weights/t5,weights/mdm256

        mdm: Apple's vis_model.pth (64, 256 or 1024 pixels) or its tensors as .safetensors.
        t5: T5 1.0, 1.1 or Flan as Hugging Face saves it. t5x: version 3 or Orbax, scanned or not.
        inception: torch-fidelity's network of FID, for `kaleido evaluate --feature inception:DIR`.
        Nothing that a file holds is run; whatever does not fit is listed, and nothing is written.
        """,
    )
    parser.add_argument("kind", choices=KINDS, metavar="|".join(KINDS), help="whose weights")
    parser.add_argument("source", type=Path, metavar="SOURCE", help="file or folder to read")
    parser.add_argument("folder", type=Path, metavar="DIR", help="new folder to write")
    parser.add_argument(
        "--text-encoder",
        type=Path,
        metavar="DIR",
        help="mdm: the T5 that the model reads, an import or a Hugging Face folder",
    )
    parser.add_argument(
        "--settings",
        type=Path,
        metavar="FILE",
        help="mdm: its config in YAML or JSON (default: found from the weights' shapes)",
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="FILE",
        help="a SentencePiece model (default: the one in the T5's folder)",
    )
    parser.add_argument(
        "--vokens",
        type=arguments.whole(0, MAX_VOKENS),
        metavar="N",
        help="t5, t5x: visual tokens that the decoder's vocabulary gets room for (default: 8192)",
    )
    parser.add_argument(
        "--seed",
        type=arguments.whole(0, arguments.MAX_SEED),
        metavar="K",
        help="t5, t5x: of the vocabulary's new rows (default: 0)",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the weights that are written (default: as they are)"
    )
    return parser


def add_export(verbs: argparse._SubParsersAction, name: str) -> argparse.ArgumentParser:
    """`kaleido export`."""
    parser = arguments.add_verb(
        verbs,
        name,
        "write a trained model as files that other programs read",
        """
        kaleido export --checkpoint runs/shapes exported            # averaged weights, one folder
        kaleido export --checkpoint runs/shapes exported --dtype bfloat16
        kaleido export --checkpoint runs/shapes exported --format stablehlo --steps 50
        kaleido export --checkpoint runs/mdm for-ml-mdm --format mdm
        kaleido export --checkpoint runs/shapes for-transformers --format t5

        safetensors: weights, config, tokenizer and model card, for Pipeline.from_pretrained.
        stablehlo: the same, with decode and render compiled for any batch (docs/weights.md).
        mdm: the denoiser in ml-mdm's names. t5: encoder and decoder in Hugging Face's.
        """,
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=Path,
        metavar="DIR",
        help="workdir, checkpoint or export to read",
    )
    parser.add_argument("folder", type=Path, metavar="OUT", help="new folder to write")
    parser.add_argument(
        "--format", choices=FORMATS, default=FORMATS[0], help="default: %(default)s"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="safetensors, stablehlo: of the weights (default: float32)",
    )
    parser.add_argument(
        "--platforms",
        metavar="A,B",
        help="stablehlo: of cpu, cuda, rocm, tpu (default: cpu,cuda)",
    )
    parser.add_argument(
        "--sampler", metavar="NAME", help="stablehlo: ddpm or ddim (default: the config's)"
    )
    parser.add_argument(
        "--steps",
        type=arguments.whole(1, arguments.MAX_STEPS),
        metavar="S",
        help="stablehlo: denoising steps (default: the config's)",
    )
    return parser


def import_weights(args: argparse.Namespace) -> None:
    """Imports weights; what does not fit is a UserError before anything is written."""
    of_mdm, of_t5, of_both = ("text_encoder", "settings"), ("vokens", "seed"), ("tokenizer",)
    if args.kind == "inception":
        _only(args, (*of_mdm, *of_t5, *of_both, "dtype"), args.kind)
    _only(args, of_mdm if args.kind != "mdm" else of_t5, args.kind)
    if args.folder.exists():
        raise UserError(f"{args.folder} already exists; name a new folder")
    if args.kind == "inception":
        _import_inception(args)
        return
    from kaleido_jax import tensor_files
    from kaleido_jax.interop import imports

    if args.kind == "mdm":
        plan = imports.plan_mdm(args.source, args.text_encoder, args.settings, args.tokenizer)
    else:
        make = imports.plan_t5 if args.kind == "t5" else imports.plan_t5x
        vokens = imports.VOKENS if args.vokens is None else args.vokens
        plan = make(args.source, args.tokenizer, vokens, args.seed or 0)
    total = sum(tensor_files.sizes_of(plan.tensors, args.dtype).values())
    with _progress(f"writing {args.folder}", total) as tick:
        plan.write(args.folder, args.dtype, tick)
    for note in plan.notes:
        print(f"kaleido: {note}", file=sys.stderr)
    parts = sorted({name.partition("/")[0] for name in plan.tensors})
    print(f"{', '.join(parts)} ({total / 2**20:,.0f} MiB): {args.folder}")


def _import_inception(args: argparse.Namespace) -> None:
    from kaleido_jax.interop import inception

    total = 4 * sum(math.prod(shape) for shape in inception.shapes().values())
    with _progress(f"writing {args.folder}", total) as tick:
        inception.import_inception(args.source, args.folder, tick)
    print(f"inception ({total / 2**20:,.0f} MiB): {args.folder}")


def export_weights(args: argparse.Namespace) -> None:
    """Exports the averaged parameters of a checkpoint, or an export in another form."""
    if args.format != "stablehlo":
        _only(args, ("platforms", "sampler", "steps"), f"--format {args.format}")
    if args.format in ("mdm", "t5"):
        _only(args, ("dtype",), f"--format {args.format}")
    if args.folder.exists():
        raise UserError(f"{args.folder} already exists; name a new folder")
    arguments.need_folder(args.checkpoint, "--checkpoint")
    from kaleido_jax import bundle as bundle_lib

    bundle = bundle_lib.load(args.checkpoint)
    dtype = args.dtype or "float32"
    with _progress(f"writing {args.folder}", _bytes(bundle.params, args.format, dtype)) as tick:
        if args.format == "safetensors":
            bundle_lib.save(args.folder, bundle, dtype, tick)
        elif args.format == "stablehlo":
            from kaleido_jax import stablehlo

            settings = {"sampler": args.sampler, "num_steps": args.steps}
            settings = {name: value for name, value in settings.items() if value is not None}
            platforms = (args.platforms or "cpu,cuda").split(",")
            stablehlo.save_stablehlo(args.folder, bundle, dtype, platforms, settings, tick)
        else:
            from kaleido_jax.interop import exports

            write = exports.export_mdm if args.format == "mdm" else exports.export_t5
            write(args.folder, bundle, tick)
    print(f"{args.format}: {args.folder}")


def _only(args: argparse.Namespace, names: tuple[str, ...], what: str) -> None:
    for name in names:
        if getattr(args, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} has no meaning for {what}")


def _bytes(params: Any, form: str, dtype: str) -> int:
    """Bytes of weights that an export writes, about."""
    from flax.traverse_util import flatten_dict

    from kaleido_jax import tensor_files

    parts = {"mdm": ("denoiser",), "t5": ("text_encoder", "latent_decoder")}.get(form, params)
    chosen = flatten_dict({name: params[name] for name in parts if name in params}, sep="/")
    return sum(tensor_files.sizes_of(chosen, dtype).values())


@contextlib.contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar with the time that is left, on stderr, where someone is looking."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda size: bar.update(task, advance=size)
