"""Makes a figure and writes it: NAME.svg, NAME.png and NAME.csv, all at once; or a table."""

from __future__ import annotations

import os
import pathlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kaleido_jax import bundle, editing
from kaleido_jax.data.shapes import HUE_NAMES
from kaleido_jax.demo.shapes import CAPTIONS
from kaleido_jax.errors import UserError
from kaleido_jax.evaluate import by_noise
from kaleido_jax.evaluate.adherence import make_detector
from kaleido_jax.evaluate.data import Data
from kaleido_jax.evaluate.run import default_detectors
from kaleido_jax.figures import guidance, noise, pictures, results_table, style, tables
from kaleido_jax.generate import Pipeline
from kaleido_jax.latents import load_document

Say = Callable[[str], None]


def write(folder: pathlib.Path, name: str, drawing: pictures.Drawing) -> list[pathlib.Path]:
    """Writes a figure and its data; files of the same names are replaced, others stay.

    Raises:
      UserError: the folder cannot be written.
    """
    figure, rows = drawing

    def save(temporary: pathlib.Path) -> None:
        style.save(figure, temporary, name)
        tables.write_csv(temporary / f"{name}.csv", rows)

    return _replace(folder, name, save)


def write_table(
    folder: pathlib.Path, results: Sequence[pathlib.Path], metrics: Sequence[str]
) -> tuple[str, list[pathlib.Path]]:
    """Writes table.md and table.csv of results; returns the Markdown and the files.

    Raises:
      UserError: the folder cannot be written, or the results make no table.
    """
    rows = results_table.rows(results, metrics)
    text = results_table.markdown(rows, metrics)

    def save(temporary: pathlib.Path) -> None:
        (temporary / "table.md").write_text(text, "utf-8")
        tables.write_csv(temporary / "table.csv", rows)

    return text, _replace(folder, "table", save)


def _replace(
    folder: pathlib.Path, name: str, save: Callable[[pathlib.Path], None]
) -> list[pathlib.Path]:
    """Puts the files that `save` writes into the folder, when all of them are written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=folder) as scratch:
            temporary = pathlib.Path(scratch)
            save(temporary)
            made = [folder / path.name for path in sorted(temporary.iterdir())]
            for path in made:
                os.replace(temporary / path.name, path)
    except OSError as error:
        raise _cannot_write(folder, error) from error
    return made


def check_writable(folder: pathlib.Path) -> None:
    """Raises UserError, before hours of drawing, for a folder that cannot be made or written."""
    above = next((p for p in (folder, *folder.absolute().parents) if p.exists()), folder)
    try:
        tempfile.TemporaryFile(dir=above).close()
    except OSError as error:
        raise _cannot_write(folder, error) from error


def _cannot_write(folder: pathlib.Path, error: OSError) -> UserError:
    return UserError(f"{folder} cannot be written: {error.strerror or error}")


def toy(quick: bool, seed: int, say: Say) -> pictures.Drawing:
    """Figure 3: trains the toy's two models from scratch and samples them."""
    from kaleido_jax.demo import toy as toy_demo
    from kaleido_jax.demo import toy_figure

    with tempfile.TemporaryDirectory(prefix="kaleido-toy-") as scratch:
        result = toy_demo.run(
            pathlib.Path(scratch), quick, seed, lambda line, share: say(f"{share:4.0%} {line}")
        )
    return toy_figure.draw(result), toy_demo.rows(result)


def curves(results: Sequence[pathlib.Path], metrics: Sequence[str], along: str) -> pictures.Drawing:
    """Figure 5, or the same along training steps, from files of results.

    Raises:
      UserError: results that cannot stand in one figure, or none that names its step.
    """
    table = guidance.rows(results, metrics, along)
    return guidance.draw(table, along), table


def over_noise(
    folder: pathlib.Path,
    metrics: Sequence[str] | None,
    samples: int,
    seed: int,
    changes: Mapping[str, str],
    say: Say,
) -> pictures.Drawing:
    """Errors and what sampling keeps, over the noise.

    Args:
      metrics: measures of the model's detectors to draw; by default those of noise.METRICS that
        it has.
      changes: other values of the config's data.source.

    Raises:
      UserError: data that cannot be read, or a measure that none of the detectors has.
    """
    model = bundle.load(folder)
    names = tuple(model.config.latents)
    data = Data(model.config, names, changes)
    detectors = [make_detector(spec) for spec in default_detectors(names, data)]
    rows = by_noise.rows(model, data, detectors, samples, seed, wanted=metrics or (), say=say)
    return noise.draw(rows, metrics or noise.METRICS), rows


def open_pipes(models: Mapping[str, pathlib.Path]) -> dict[str, Pipeline]:
    """Models by name."""
    return {name: Pipeline.from_pretrained(folder) for name, folder in models.items()}


def captions_for(pipe: Pipeline, prompts: Sequence[str] | None) -> list[str]:
    """The prompts, or those of shapes for a model of shapes.

    Raises:
      UserError: none for another model.
    """
    if prompts:
        return list(prompts)
    if pipe.config.data.source.name == "shapes":
        return list(CAPTIONS)
    raise UserError("this model was not trained on shapes: name captions with --prompt")


def edits(
    pipe: Pipeline,
    source: pathlib.Path | None,
    script: pathlib.Path | None,
    prompts: Sequence[str] | None,
    seed: int,
    settings: Mapping[str, Any],
) -> pictures.Drawing:
    """Figures 8 and 14: of a document, or of the first latents that the model writes.

    Raises:
      UserError: nothing to edit, edits that cannot be made.
    """
    if source is not None:
        if prompts:
            raise UserError("figures editing: --document has a caption of its own, so no --prompt")
        document = load_document(source)
    else:
        if not pipe.names:
            raise UserError("figures editing: this model has no latents to edit")
        caption = captions_for(pipe, prompts)[0]
        document = pipe.draw_latents(caption, 1, seed=seed, **settings)[0]
    if script is not None:
        steps = editing.read_steps(script)
    else:
        steps = pictures.default_steps(document, HUE_NAMES)
    return pictures.edited(pipe.edit(document, steps, seed=seed, **settings), steps)
