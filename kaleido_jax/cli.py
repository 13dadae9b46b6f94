"""The command `kaleido`: one small function per verb, heavy imports inside them.

Exit status: 0 done, 1 failed, 2 misuse (one line says what), 130 interrupted; of `train` also 75
stopped by a signal after saving, 124 hung (docs/faults.md).
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import traceback
from collections.abc import Iterable, Sequence
from typing import NoReturn

import kaleido_jax
from kaleido_jax import (
    cli_annotate,
    cli_bench,
    cli_build,
    cli_edit,
    cli_evaluate,
    cli_figures,
    cli_sample,
    cli_serve,
    cli_tasks,
    cli_weights,
)
from kaleido_jax import cli_arguments as arguments
from kaleido_jax.errors import StopRun, UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb.

    Args:
      argv: the words after `kaleido`; those of the process by default.

    Returns:
      The exit status.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    try:
        args = parse([word for word in words if word != "--debug"])
        return args.run(args) or 0
    except SystemExit as stop:  # argparse after --help and --version
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt:
        return _say("interrupted", 130)
    except BrokenPipeError:
        # The reader (`| head`) went away; keep the interpreter from flushing into the pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except StopRun as stop:
        return _say(str(stop), stop.status)
    except Exception as error:
        if debug:
            traceback.print_exc()
        if _is_misuse(error):
            return _say(str(error), 2)
        hint = "" if debug else " (--debug shows where)"
        return _say(f"{type(error).__name__}: {_first_line(error)}{hint}", 1)


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The arguments of one verb, `run` its function.

    `overrides` has the `--config.a.b=VALUE` words of OVERRIDE_VERBS, `beam` the words after `--`,
    which the verbs in BEAM_VERBS hand on.

    Raises:
      UserError: an unknown verb or argument (naming the nearest), a value out of range.
      SystemExit: after --help and --version.
    """
    words, beam = _split_beam(words)
    if " ".join(words[:2]) in VERBS:
        words = [" ".join(words[:2]), *words[2:]]
    verb = words[0] if words else ""
    if not verb.startswith("-") and verb not in VERBS:
        what = f"unknown verb {verb!r}{_nearest(verb, VERBS)}" if verb else "which verb?"
        raise UserError(f"{what} (verbs: {', '.join(VERBS)}; `kaleido --help` explains)")
    overrides = [word for word in words if word.startswith("--config.")]
    for word in overrides:
        if verb not in OVERRIDE_VERBS:
            raise UserError(f"{word}: only `kaleido train` and `bench train` take overrides")
        if "=" not in word:
            raise UserError(f"{word}: write --config.a.b=VALUE, with the equals sign")
    if beam is not None and verb not in BEAM_VERBS:
        raise UserError(f"{verb}: only {' and '.join(BEAM_VERBS)} take Beam's words after --")
    args = build_parser().parse_args([word for word in words if word not in overrides])
    args.overrides, args.beam = overrides, beam or []
    return args


def _split_beam(words: Sequence[str]) -> tuple[list[str], list[str] | None]:
    """The words before `--`, and those after it; None without it."""
    words = list(words)
    if "--" not in words:
        return words, None
    place = words.index("--")
    return words[:place], words[place + 1 :]


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs; each sets `run` to its function."""
    parser = _Parser(
        prog="kaleido",
        description="Kaleido Diffusion: draw latents for a caption, then the picture.",
        epilog="`kaleido VERB --help` explains a verb. Any verb takes --debug.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=kaleido_jax.__version__)
    verbs = parser.add_subparsers(
        title="verbs", dest="verb", metavar="VERB", required=True, parser_class=_Parser
    )
    for name, (add, run) in VERBS.items():
        add(verbs, name).set_defaults(run=run)
    return parser


def demo(args: argparse.Namespace) -> None:
    """Trains the toy, samples the shapes model and its baseline, writes a page of both."""
    from kaleido_jax import demo as package

    package.run(args.out, quick=args.quick, seed=args.seed, overwrite=args.overwrite)


def doctor(args: argparse.Namespace) -> int:
    """Reports on the machine, or on a workdir's checkpoints; 1 if there is something to mend."""
    from kaleido_jax import cli_doctor

    return cli_doctor.run() if args.workdir is None else cli_doctor.check_workdir(args.workdir)


def train(args: argparse.Namespace) -> None:
    """Trains by a config, or with --dry-run only says what would be trained."""
    from kaleido_jax import config as config_module

    config = config_module.load_config(args.config, args.overrides)
    of_dry_run = ("simulate_devices", "every_parameter", "no_compile", "json")
    for name in of_dry_run:
        if getattr(args, name) and not args.dry_run:
            raise UserError(f"train: --{name.replace('_', '-')} needs --dry-run")
    if args.dry_run:
        if args.simulate_devices:
            from kaleido_jax import dry_run

            dry_run.simulate_devices(args.simulate_devices)
        from kaleido_jax import cli_dry_run

        cli_dry_run.run(
            config,
            compiled=not args.no_compile,
            every_parameter=args.every_parameter,
            as_json=args.json,
        )
        return
    if args.workdir is None:
        raise UserError("train: --workdir DIR is needed (or --dry-run)")
    from kaleido_jax import distributed

    # Before anything asks for devices: the others' would be missing.
    distributed.start(os.environ, lambda line: print(line, flush=True))
    from kaleido_jax import cli_train, training_loop

    hook = cli_train.sample_hook(config) if config.train.sample_every else None
    training_loop.train(
        config,
        args.workdir,
        sample_hook=hook,
        allow_config_change=args.allow_config_change,
        start_anew=args.start_anew,
    )


VERBS = {
    "annotate": (cli_annotate.add_annotate, cli_annotate.annotate),
    "annotate fit-vokens": (cli_annotate.add_fit_vokens, cli_annotate.fit_vokens),
    "build": (cli_build.add_build, cli_build.build),
    "tasks": (cli_tasks.add_tasks, cli_tasks.tasks),
    "bench train": (cli_bench.add_bench_train, cli_bench.bench_train),
    "bench sample": (cli_bench.add_bench_sample, cli_bench.bench_sample),
    "bench data": (cli_tasks.add_bench_data, cli_tasks.bench_data),
    "bench decode": (cli_bench.add_bench_decode, cli_bench.bench_decode),
    "demo": (arguments.add_demo, demo),
    "doctor": (arguments.add_doctor, doctor),
    "train": (arguments.add_train, train),
    "sample": (cli_sample.add_sample, cli_sample.sample),
    "edit": (cli_edit.add_edit, cli_edit.edit),
    "serve": (cli_serve.add_serve, cli_serve.serve),
    "import": (cli_weights.add_import, cli_weights.import_weights),
    "evaluate": (cli_evaluate.add_evaluate, cli_evaluate.evaluate),
    "figures": (cli_figures.add_figures, cli_figures.figures),
    "export": (cli_weights.add_export, cli_weights.export_weights),
}
BEAM_VERBS = ("annotate", "build")
OVERRIDE_VERBS = ("train", "bench train")


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, with the nearest of the known arguments."""

    def error(self, message: str) -> NoReturn:
        verb = self.prog.removeprefix("kaleido").strip()
        raise UserError(f"{verb}: {message}" if verb else message)

    def parse_args(self, args=None, namespace=None):
        namespace, rest = self.parse_known_args(args, namespace)
        if rest:
            known = [
                flag for action in self._verb(namespace)._actions for flag in action.option_strings
            ]
            self.error(f"{namespace.verb}: unknown argument {rest[0]!r}{_nearest(rest[0], known)}")
        return namespace

    def _verb(self, namespace: argparse.Namespace) -> argparse.ArgumentParser:
        return self._subparsers._group_actions[0].choices[namespace.verb]


def _nearest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word.partition("=")[0], list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def _is_misuse(error: Exception) -> bool:
    if isinstance(error, UserError):
        return True
    latents = sys.modules.get("kaleido_jax.latents.errors")  # no error of it without the module
    return latents is not None and isinstance(error, latents.LatentError)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no message"


def _say(message: str, status: int) -> int:
    print(f"kaleido: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
