"""`kaleido serve`: its arguments and what it runs."""

from __future__ import annotations

import argparse
import os
import pathlib

from kaleido_jax import cli_arguments as arguments
from kaleido_jax import cli_sample
from kaleido_jax.errors import UserError

TOKEN_VARIABLE = "KALEIDO_TOKEN"


def add_serve(verbs: argparse._SubParsersAction, name: str) -> argparse.ArgumentParser:
    """`kaleido serve`."""
    parser = arguments.add_verb(
        verbs,
        name,
        "open the page on which latents are read and edited",
        f"""
        kaleido serve                                      # the shapes model of the package
        kaleido serve --checkpoint runs/kaleido --baseline runs/baseline
        {TOKEN_VARIABLE}=a-long-secret kaleido serve --host 0.0.0.0

        The page is at http://127.0.0.1:7860/ and nobody else can reach it. On another host visitors
        need a token: that of the variable {TOKEN_VARIABLE}, or one that is made up and printed.
        Needs the extra 'ui'. docs/page.md explains more.
        """,
    )
    parser.add_argument(
        "--checkpoint",
        type=pathlib.Path,
        metavar="DIR",
        help="workdir, checkpoint or export (default: the shapes model of the package)",
    )
    parser.add_argument(
        "--baseline", type=pathlib.Path, metavar="DIR", help="another model to compare it with"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)"
    )
    parser.add_argument(
        "--port",
        type=arguments.whole(0, 65535),
        default=7860,
        help="port to listen on, 0 for any (default: 7860)",
    )
    parser.add_argument(
        "--waiting",
        type=arguments.whole(1, 1000),
        default=32,
        metavar="N",
        help="requests that may wait at once (default: 32)",
    )
    cli_sample.add_cache(parser)
    return parser


def serve(args: argparse.Namespace) -> None:
    """Serves the page until it is interrupted."""
    for flag in ("checkpoint", "baseline"):
        if getattr(args, flag) is not None:
            arguments.need_folder(getattr(args, flag), f"--{flag}")
    cli_sample.use_cache(args)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        from kaleido_jax.ui import server
    except ModuleNotFoundError as error:
        if error.name not in ("gradio", "fastapi", "uvicorn"):
            raise
        raise UserError("serve: the page needs gradio; install the extra 'ui'") from error
    from kaleido_jax.ui.studio import open_engines

    server.choose_token(args.host, os.environ.get(TOKEN_VARIABLE))
    server.serve(
        open_engines(args.checkpoint, args.baseline),
        host=args.host,
        port=args.port,
        token=os.environ.get(TOKEN_VARIABLE),
        waiting=args.waiting,
        say=lambda words: print(words, flush=True),
    )
