"""The pipeline: prompts -> latents z ~ p(z | c) -> pictures x ~ p(x | z, c) (after Eq. 7)."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int, UInt8

from kaleido_jax import bundle as bundle_lib
from kaleido_jax import config as config_lib
from kaleido_jax import grammar, hub, tokens
from kaleido_jax.batches import (
    MAX_INDEX,
    MAX_PICTURES,
    MAX_SEED,
    batches,
    check_count,
    check_range,
)
from kaleido_jax.edit_methods import EditMethods
from kaleido_jax.errors import UserError
from kaleido_jax.latents import LatentDocument
from kaleido_jax.outputs import Output, Progress, check_folder, grid, to_uint8, write_outputs
from kaleido_jax.prompts import clean_prompt
from kaleido_jax.runner import Runner
from kaleido_jax.settings import Settings
from kaleido_jax.streaming import StreamMethods
from kaleido_jax.written import allowed_tokens, latent_ids, own_tokens, read_latents

__all__ = ["Output", "Pipeline", "Progress", "Settings", "check_folder", "grid", "write_outputs"]

# Called every few steps; whatever it raises ends the sampling and passes through.
OnStep = Callable[[Progress], None]
# Called before each batch that the latent decoder draws; may raise as well.
OnDraw = Callable[[], None]

# Draws of z before a picture is made with what of it is valid (FAULTS: bounded retries).
MAX_DRAWS = 5


class Pipeline(EditMethods, StreamMethods):
    """A model that draws latents and pictures for prompts.

    Picture i of a prompt depends on (model, prompt, seed, i) and the settings alone, not on the
    batch, the other prompts or the devices; only the order of float sums differs with the batch
    size.

    Attributes:
      config: the model's config.
      defaults: sampling settings of the config.
      names: the latents that the model writes, in order; () is the MDM baseline.
      runner: its compiled stages on the mesh.
      model_hashes: the fields of a document that say which model made it.
      checkpoint_hash: of the checkpoint or export, as in its documents.
      step: of the training's checkpoint, None for an export.
    """

    def __init__(self, bundle: bundle_lib.Bundle, mesh: Mesh | None = None):
        """Places the parameters on the mesh, by default all devices as one data axis.

        Raises:
          UserError: parameters that do not fit the config, all differences listed.
        """
        config = self.config = bundle.config
        self.defaults = Settings.of_config(config)
        self.names = tuple(config.latents)
        self.checkpoint_hash = bundle.fingerprint.replace(" ", "-")
        self.step = bundle.step
        self._vocabulary = bundle.vocabulary
        self.model_hashes = {
            "model_config_hash": config_lib.fingerprint(config),
            "checkpoint_hash": self.checkpoint_hash,
        }
        self.runner = Runner(config, bundle.params, mesh)
        self._allowed = None
        if self.names:
            size = self.runner.vocab_size
            self._allowed = allowed_tokens(self._vocabulary, self.names, size)
        self._tables = None

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, mesh: Mesh | None = None) -> Pipeline:
        """Opens a workdir, checkpoint or export, or a model on a hub.

        Args:
          folder: a folder; where there is none, owner/name or owner/name@revision on the hub, which
            is downloaded once (with `huggingface_hub`) and then opens offline.
          mesh: devices to place the parameters on; all of them by default.

        Raises:
          UserError: there is no whole model of that name, or it is damaged.
        """
        if hub.is_name(folder) and not os.path.exists(folder):
            folder = hub.download(folder)
        return cls(bundle_lib.load(folder), mesh)

    def describe(self) -> dict[str, Any]:
        """Hashes of checkpoint and config, its step, the latents, the decay of the averages."""
        return {
            **self.model_hashes,
            "step": self.step,
            "latents": list(self.names),
            "ema_decay": self.config.optim.ema_decay,
        }

    def save_pretrained(self, folder: str | os.PathLike, dtype: str = "float32") -> pathlib.Path:
        """Writes an export folder: safetensors, config, tokenizer, model card, manifest.

        Args:
          folder: a new folder.
          dtype: of the weights: 'float32', 'bfloat16' or 'float16'.

        Raises:
          UserError: the folder exists or cannot be written.
        """
        return bundle_lib.save(folder, self._bundle(), dtype)

    def push_to_hub(
        self,
        name: str,
        *,
        dtype: str = "float32",
        private: bool = True,
        message: str = "Upload a Kaleido model",
    ) -> str:
        """Exports to owner/name on the hub, private unless told otherwise; returns its address.

        Raises:
          UserError: `huggingface_hub` is not installed, no permission, no connection.
        """
        with tempfile.TemporaryDirectory() as scratch:
            folder = self.save_pretrained(os.path.join(scratch, "export"), dtype)
            return hub.upload(folder, name, private, message)

    def _bundle(self) -> bundle_lib.Bundle:
        return bundle_lib.Bundle(
            self.config, self.runner.params, self._vocabulary, self.checkpoint_hash
        )

    def __call__(
        self,
        prompts: str | Sequence[str],
        num_images: int = 1,
        *,
        seed: int = 0,
        first_index: int = 0,
        batch_size: int | None = None,
        on_step: OnStep | None = None,
        **settings: Any,
    ) -> Output:
        """Draws latents, then a picture for each.

        Args:
          prompts: one caption or several.
          num_images: pictures per prompt, 1..10,000 (and so many in all).
          seed: 0..2**32 - 1.
          first_index: picture i of a prompt uses the random numbers of index first_index + i.
          batch_size: pictures at once, rounded up to the devices; 16 or fewer by default.
          on_step: is told of every second denoising step; may raise to stop.
          settings: fields of `Settings`; the config's defaults otherwise.

        Raises:
          UserError: anything out of bounds.
        """
        documents, warnings = self._draw(
            prompts, num_images, seed, first_index, batch_size, settings
        )
        output = self.render(documents, batch_size=batch_size, on_step=on_step)
        return dataclasses.replace(output, warnings=warnings)

    def draw_latents(
        self,
        prompts: str | Sequence[str],
        num_images: int = 1,
        *,
        seed: int = 0,
        first_index: int | Sequence[int] = 0,
        batch_size: int | None = None,
        on_draw: OnDraw | None = None,
        **settings: Any,
    ) -> list[LatentDocument]:
        """The documents of `__call__` without their pictures: z ~ p(z | c), to read or edit.

        Arguments as `__call__`, but that `first_index` may be one for each prompt, and `on_draw` is
        called before each batch of z is drawn, and may raise to stop. A document whose z stayed
        unfinished or invalid in all draws holds what of it is valid, and says so under
        `decoding['problems']`.
        """
        return self._draw(prompts, num_images, seed, first_index, batch_size, settings, on_draw)[0]

    def render(
        self,
        documents: LatentDocument | Sequence[LatentDocument],
        *,
        seed: int | None = None,
        batch_size: int | None = None,
        on_step: OnStep | None = None,
        **settings: Any,
    ) -> Output:
        """Pictures x ~ p(x | z, c) of documents, from the documents alone.

        The noise is that of the document's seed and index, so an edited document gives the
        edited picture, and an unedited one the same picture again.

        Args:
          documents: one or several, of this model or another with the same latents.
          seed: draws other noise than the documents'.
          batch_size, on_step: as in `__call__`.
          settings: fields of `Settings`; each document's own otherwise.

        Raises:
          UserError: anything out of bounds, or latents that this model does not know.
        """
        documents = [documents] if isinstance(documents, LatentDocument) else list(documents)
        check_count(len(documents), "documents")
        plain = [self.defaults.of_document(doc).replace(settings) for doc in documents]
        batch = self.runner.batch_size(batch_size, len(documents))
        if seed is not None:
            check_range("seed", seed, 0, MAX_SEED)
            documents = [dataclasses.replace(doc, seed=seed) for doc in documents]
        documents = [
            dataclasses.replace(doc, batch_size=batch, **self.model_hashes, **chosen.denoising())
            for doc, chosen in zip(documents, plain, strict=True)
        ]
        seeds, indices = _random_numbers(documents)
        captions = self._caption_tokens([doc.caption for doc in documents])
        latents = np.stack([self._latent_tokens(doc) for doc in documents])
        states = self.runner.encode(captions)
        samples = np.zeros((len(documents), *self.runner.shapes[0]), np.float32)
        for chosen in dict.fromkeys(plain):
            rows = np.array([i for i, other in enumerate(plain) if other == chosen])
            for part in batches(rows, batch):
                tell = None if on_step is None else self._teller(on_step, part, chosen.num_steps)
                samples[part] = self.runner.render(
                    states, part, latents[part], seeds[part], indices[part], batch, chosen, tell
                )
        return Output(self._to_uint8(samples), samples, documents, [])

    def _teller(
        self, on_step: OnStep, part: Int[np.ndarray, "rows"], num_steps: int
    ) -> Callable[[int, Float[np.ndarray, "rows h w c"]], None]:
        pictures = part.tolist()

        def tell(step: int, x0: Float[np.ndarray, "rows h w c"]) -> None:
            on_step(Progress(pictures, step, num_steps, self._to_uint8(x0)))

        return tell

    def _to_uint8(self, samples: Float[np.ndarray, "n h w c"]) -> UInt8[np.ndarray, "n h w c"]:
        return to_uint8(samples, self.config.data.pixel_centre, self.config.data.pixel_scale)

    def _draw(
        self,
        prompts: str | Sequence[str],
        num_images: int,
        seed: int,
        first_index: int | Sequence[int],
        batch_size: int | None,
        settings: Mapping[str, Any],
        on_draw: OnDraw | None = None,
    ) -> tuple[list[LatentDocument], list[str]]:
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise UserError("prompts must be a string or a list of strings")
        prompts = [clean_prompt(prompt, f"prompt {i + 1}") for i, prompt in enumerate(prompts)]
        check_range("num_images", num_images, 1, MAX_PICTURES)
        check_count(len(prompts) * num_images, "pictures")
        check_range("seed", seed, 0, MAX_SEED)
        one = isinstance(first_index, (int, np.integer))
        firsts = [first_index] * len(prompts) if one else list(first_index)
        if len(firsts) != len(prompts):
            raise UserError(f"{len(firsts)} values of first_index for {len(prompts)} prompts")
        for first in firsts:
            check_range("first_index", first, 0, MAX_INDEX - num_images)
        chosen = self.defaults.replace(settings)
        count = len(prompts) * num_images
        batch = self.runner.batch_size(batch_size, count)
        blank = [
            self._blank(prompt, seed, int(first) + i, batch, chosen)
            for prompt, first in zip(prompts, firsts, strict=True)
            for i in range(num_images)
        ]
        if not self.names:
            return blank, []
        return self._write_latents(blank, chosen, batch, on_draw=on_draw)

    def _blank(
        self, caption: str, seed: int, index: int, batch: int, chosen: Settings
    ) -> LatentDocument:
        """The document of a picture whose z is not drawn yet."""
        return LatentDocument(
            caption=caption,
            latents={},
            seed=seed,
            sample_index=index,
            batch_size=batch,
            **self.model_hashes,
            **chosen.denoising(),
        )

    def _write_latents(
        self,
        blank: list[LatentDocument],
        chosen: Settings,
        batch: int,
        numbers: Sequence[int] | None = None,
        on_draw: OnDraw | None = None,
    ) -> tuple[list[LatentDocument], list[str]]:
        """Fills in z; what is not valid is drawn again, with other random numbers, a few times.

        The warnings call the pictures by `numbers`, or by their places.
        """
        states = self.runner.encode(self._caption_tokens([doc.caption for doc in blank]))
        seeds, indices = _random_numbers(blank)
        documents = list(blank)
        problems: dict[int, list[str]] = {}
        pending = np.arange(len(blank))
        for attempt in range(MAX_DRAWS):
            for part in batches(pending, batch):
                if on_draw is not None:
                    on_draw()
                ids, log_prob = self.runner.decode(
                    states,
                    part,
                    seeds[part],
                    indices[part],
                    batch,
                    chosen,
                    attempt,
                    self._constraint() if chosen.constrained else self._allowed,
                )
                for i, row, value in zip(part, ids, log_prob, strict=True):
                    latents, problems[i] = read_latents(self._vocabulary, row, self.names)
                    decoding = {
                        **chosen.decoding(),
                        "seed": blank[i].seed,
                        "draws": attempt + 1,
                    }
                    own = own_tokens(self._vocabulary, row, latents, self.names)
                    if own is not None and not problems[i]:
                        decoding["tokens"] = own
                    if problems[i]:
                        decoding["problems"] = [problem[:200] for problem in problems[i]]
                    documents[i] = dataclasses.replace(
                        blank[i], latents=latents, decoding=decoding, log_prob=float(value)
                    )
            pending = np.array([i for i in pending if problems[i]], int)
            if not pending.size:
                break
        numbers = range(len(blank)) if numbers is None else numbers
        warnings = [
            f"picture {numbers[i]} ({documents[i].caption[:60]!r},"
            f" index {documents[i].sample_index}): latents not valid in {MAX_DRAWS} draws:"
            f" {'; '.join(problems[i])}"
            for i in pending
        ]
        return documents, warnings

    def _constraint(self) -> grammar.Tables:
        """The tables of constrained decoding, made once and kept on the devices."""
        if self._tables is None:
            runner = self.runner
            tables = grammar.compile_tables(self._vocabulary, self.names, runner.vocab_size)
            if tables.shortest > runner.latent_length:
                raise UserError(
                    f"config key 'data.latent_length' is {runner.latent_length}; the latents "
                    f"{', '.join(self.names)} need {tables.shortest} tokens at least"
                )
            self._tables = runner.place(tables)
        return self._tables

    # ---- inputs ---------------------------------------------------------------------------

    def _caption_tokens(self, captions: Sequence[str]) -> Int[np.ndarray, "n lc"]:
        length = self.config.data.caption_length
        ids = {
            caption: tokens.pad(
                self._vocabulary.encode_caption(clean_prompt(caption, "caption"), length), length
            )
            for caption in dict.fromkeys(captions)
        }
        return np.stack([ids[caption] for caption in captions])

    def _latent_tokens(self, document: LatentDocument) -> Int[np.ndarray, "lz"]:
        unknown = [name for name in document.latents if name not in self.names]
        if unknown:
            known = ", ".join(self.names) or "none"
            raise UserError(f"this model has no latent {unknown[0]!r}; its latents: {known}")
        if not self.names:
            return np.zeros(0, np.int32)
        return latent_ids(self._vocabulary, document, self.names, self.runner.latent_length)


def _random_numbers(
    documents: Sequence[LatentDocument],
) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "n"]]:
    """Seeds and sample indices, which decide all random numbers of the pictures."""
    pairs = [(document.seed, document.sample_index) for document in documents]
    seeds, indices = np.array(pairs, np.int64).T
    return seeds, indices
