"""`kaleido edit`: its arguments and what it runs."""

from __future__ import annotations

import argparse
import pathlib
import sys

from kaleido_jax import cli_arguments as arguments
from kaleido_jax.cli_sample import add_cache, use_cache
from kaleido_jax.errors import UserError

# Verb -> (what stands after it, help); as kaleido_jax/editing.py has them.
EDITS = {
    "set": ("NAME=STRING", "another string for a latent, or another caption"),
    "word": ("OLD=NEW", "replace words in every latent that holds them"),
    "move": ("OBJECT=DX,DY", "move a box or ellipse, in thousandths of the picture"),
    "resize": ("OBJECT=FACTOR", "scale a box or ellipse about its centre"),
    "place": ("OBJECT=NUMBERS", "give a box (4 numbers) or ellipse (5) other numbers"),
    "add": ("PHRASE=NUMBERS", "add a box or ellipse"),
    "remove": ("OBJECT", "take a box or ellipse away"),
    "voken": ("PLACE=ID", "put another visual token at a place, 0 to 31"),
    "keep": ("NAME,NAME", "draw all latents but these anew"),
    "resample": ("NAME,NAME", "draw these latents anew, given the others"),
}


class _Edit(argparse.Action):
    """Appends (verb, argument) to the last of the steps."""

    def __call__(self, parser, namespace, values, option_string=None):
        steps = [*(namespace.steps or [[]])]
        steps[-1] = [*steps[-1], (self.dest, values)]
        namespace.steps = steps


class _Then(argparse.Action):
    """Begins the next step."""

    def __call__(self, parser, namespace, values, option_string=None):
        namespace.steps = [*(namespace.steps or [[]]), []]


def add_edit(verbs: argparse._SubParsersAction, name: str) -> argparse.ArgumentParser:
    """`kaleido edit`."""
    parser = arguments.add_verb(
        verbs,
        name,
        "edit what was written for a picture, and draw the picture again with the same noise",
        """
        kaleido edit samples/000000.png --checkpoint run --word red=blue
        kaleido edit samples/000000.json --checkpoint run --move dog=150,0 --then --remove cup
        kaleido edit samples/000000.png --checkpoint run --set 'text=A frog on cobblestones.'
        kaleido edit samples/000000.png --checkpoint run --keep text,bbox
        kaleido edit samples/000000.png --checkpoint run --script edits.jsonl --out out
        kaleido edit --session session --checkpoint run --out again

        An OBJECT is named by words of its phrase (dog, or dog#2 for the second) or its number (#3);
        bbox:dog means that of one latent only. Edits are made in order; --then begins the next
        step, which goes on from the one before, and every step has its picture. sheet.png has them
        side by side with their latents. docs/editing.md explains more.
        """,
    )
    parser.add_argument(
        "document",
        nargs="?",
        type=pathlib.Path,
        metavar="DOCUMENT",
        help="a document (.json), or a picture (.png) with its document inside",
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=pathlib.Path,
        metavar="DIR",
        help="workdir, checkpoint or export of the model",
    )
    for verb, (metavar, text) in EDITS.items():
        parser.add_argument(f"--{verb}", action=_Edit, metavar=metavar, help=text)
    parser.add_argument("--then", action=_Then, nargs=0, help="begin the next step")
    parser.add_argument(
        "--script",
        type=pathlib.Path,
        metavar="FILE",
        help='steps from JSONL instead, a line each: {"word": "red=blue", "keep": "text"}',
    )
    parser.add_argument(
        "--session",
        type=pathlib.Path,
        metavar="DIR",
        help="make every picture of a session from the page again, and compare the bytes",
    )
    parser.add_argument(
        "--seed",
        type=arguments.whole(0, arguments.MAX_SEED),
        default=0,
        metavar="K",
        help="of what is drawn anew; the picture keeps its noise (default: 0)",
    )
    parser.add_argument(
        "--candidates",
        type=arguments.whole(1, 256),
        default=16,
        metavar="M",
        help="draws to choose from where a kept latent follows a drawn one (default: 16)",
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path("edited"),
        metavar="DIR",
        help="new or empty folder to write (default: ./edited)",
    )
    add_cache(parser)
    parser.set_defaults(steps=None)
    return parser


def edit(args: argparse.Namespace) -> int:
    """Makes the edits, renders every step, writes pictures, documents and a contact sheet.

    With --session: 1 if a picture differs from the session's.
    """
    if args.session is not None:
        return _replay(args)
    if args.document is None:
        raise UserError("edit: name a document or picture, or a session with --session DIR")
    if args.script is not None and args.steps is not None:
        raise UserError("edit: give edits or --script FILE, not both")
    if args.script is None and args.steps is None:
        raise UserError(f"edit: nothing to do; give --script or one of --{', --'.join(EDITS)}")
    arguments.need_folder(args.checkpoint, "--checkpoint")

    from kaleido_jax import editing
    from kaleido_jax.latents import load_document

    if args.script is None:
        steps = args.steps
        editing.check_steps(steps, "edit")
    else:
        steps = editing.read_steps(args.script)
    document = load_document(args.document)
    use_cache(args)

    from kaleido_jax import generate

    generate.check_folder(args.out)
    pipe = generate.Pipeline.from_pretrained(args.checkpoint)
    output = pipe.edit(document, steps, seed=args.seed, candidates=args.candidates)
    sheets = {}
    if output.images.shape[-1] == 3:
        sheets["sheet.png"] = editing.contact_sheet(output, steps)
    generate.write_outputs(output, args.out, sheets)
    for number, (old, new) in enumerate(zip(output.documents, output.documents[1:], strict=False)):
        if old.latents == new.latents and old.caption == new.caption:
            print(f"kaleido: step {number + 1} changed nothing", file=sys.stderr)
    print(f"{len(steps)} step(s) of edits, {len(output.images)} pictures: {args.out}")
    return 0


def _replay(args: argparse.Namespace) -> int:
    if args.document is not None or args.steps is not None or args.script is not None:
        raise UserError("edit: --session DIR has its own edits; give no document and no edits")
    arguments.need_folder(args.session, "--session")
    arguments.need_folder(args.checkpoint, "--checkpoint")

    import jax

    from kaleido_jax import generate, mesh, session_folder

    pictures = session_folder.read_session(args.session)
    # On one device, as on the page: how rows are split decides the order of sums.
    alone = mesh.make_mesh(devices=jax.local_devices()[:1])
    pipe = generate.Pipeline.from_pretrained(args.checkpoint, alone)
    differ = session_folder.replay(pipe, args.session, args.out)
    for name in differ:
        print(f"kaleido: {args.out / name} differs from {args.session / name}", file=sys.stderr)
    same = len(pictures) - len(differ)
    print(f"{same} of {len(pictures)} pictures to the same bytes: {args.out}")
    return 1 if differ else 0
