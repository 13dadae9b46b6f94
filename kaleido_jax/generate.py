"""The pipeline: prompts -> latents z ~ p(z | c) -> pictures x ~ p(x | z, c) (after Eq. 7)."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from kaleido_jax import bundle as bundle_lib
from kaleido_jax import config as config_lib
from kaleido_jax import hub, stages, tokens
from kaleido_jax import mesh as mesh_lib
from kaleido_jax.errors import UserError
from kaleido_jax.latents import LatentDocument
from kaleido_jax.models.kaleido import Kaleido, KaleidoConfig
from kaleido_jax.outputs import Output, check_folder, grid, to_uint8, write_outputs
from kaleido_jax.prompts import clean_prompt
from kaleido_jax.settings import Settings
from kaleido_jax.types import Conditioning
from kaleido_jax.written import allowed_tokens, latent_ids, read_latents

__all__ = ["Output", "Pipeline", "Settings", "check_folder", "grid", "write_outputs"]

MAX_PICTURES = 10_000
MAX_SEED = 2**32 - 1
MAX_INDEX = 2**31 - 1
DEFAULT_BATCH = 16
# Draws of z before a picture is made with what of it is valid (FAULTS: bounded retries).
MAX_DRAWS = 5


class Pipeline:
    """A model that draws latents and pictures for prompts.

    Picture i of a prompt depends on (model, prompt, seed, i) and the settings alone, not on the
    batch, the other prompts or the devices; only the order of float sums differs with the batch
    size.

    Attributes:
      config: the model's config.
      defaults: sampling settings of the config.
      names: the latents that the model writes, in order; () is the MDM baseline.
    """

    def __init__(self, bundle: bundle_lib.Bundle, mesh: Mesh | None = None):
        """Places the parameters on the mesh, by default all devices as one data axis.

        Raises:
          UserError: parameters that do not fit the config, all differences listed.
        """
        config = self.config = bundle.config
        self.defaults = Settings.of_config(config)
        self.names = tuple(config.latents)
        self._vocabulary = bundle.vocabulary
        self._hashes = {
            "model_config_hash": config_lib.fingerprint(config),
            "checkpoint_hash": bundle.fingerprint.replace(" ", "-"),
        }
        self._model = Kaleido(KaleidoConfig.from_config(config))
        self._mesh = mesh_lib.make_mesh() if mesh is None else mesh
        self._rows = self._mesh.shape["data"] * self._mesh.shape["fsdp"]
        data = config.data
        self._latent_length = data.latent_length if self.names else 0
        self._process = stages.process_of(config, self._model.cfg.ratios)
        self._params = stages.place_params(
            self._model,
            bundle.params,
            self._mesh,
            jnp.ones((1, data.caption_length), jnp.int32),
            jnp.ones((1, self._latent_length), jnp.int32),
            tuple(jnp.zeros((1, *shape)) for shape in self._process.shapes),
            jnp.zeros((1,)),
        )
        self._null = None
        self._allowed = None
        if self.names:
            size = self._model.cfg.latent_decoder.vocab_size
            self._allowed = allowed_tokens(self._vocabulary, self.names, size)

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
        made_from = self._hashes["checkpoint_hash"]
        return bundle_lib.Bundle(self.config, self._params, self._vocabulary, made_from)

    def __call__(
        self,
        prompts: str | Sequence[str],
        num_images: int = 1,
        *,
        seed: int = 0,
        first_index: int = 0,
        batch_size: int | None = None,
        **settings: Any,
    ) -> Output:
        """Draws latents, then a picture for each.

        Args:
          prompts: one caption or several.
          num_images: pictures per prompt, 1..10,000 (and so many in all).
          seed: 0..2**32 - 1.
          first_index: picture i of a prompt uses the random numbers of index first_index + i.
          batch_size: pictures at once, rounded up to the devices; 16 or fewer by default.
          settings: fields of `Settings`; the config's defaults otherwise.

        Raises:
          UserError: anything out of bounds.
        """
        documents, warnings = self._draw(
            prompts, num_images, seed, first_index, batch_size, settings
        )
        output = self.render(documents, batch_size=batch_size)
        return dataclasses.replace(output, warnings=warnings)

    def draw_latents(
        self,
        prompts: str | Sequence[str],
        num_images: int = 1,
        *,
        seed: int = 0,
        first_index: int = 0,
        batch_size: int | None = None,
        **settings: Any,
    ) -> list[LatentDocument]:
        """The documents of `__call__` without their pictures: z ~ p(z | c), to read or edit.

        Arguments as `__call__`. A document whose z stayed unfinished or invalid in all draws
        holds what of it is valid, and says so under `decoding['problems']`.
        """
        return self._draw(prompts, num_images, seed, first_index, batch_size, settings)[0]

    def render(
        self,
        documents: LatentDocument | Sequence[LatentDocument],
        *,
        seed: int | None = None,
        batch_size: int | None = None,
        **settings: Any,
    ) -> Output:
        """Pictures x ~ p(x | z, c) of documents, from the documents alone.

        The noise is that of the document's seed and index, so an edited document gives the
        edited picture, and an unedited one the same picture again.

        Args:
          documents: one or several, of this model or another with the same latents.
          seed: draws other noise than the documents'.
          batch_size: as in `__call__`.
          settings: fields of `Settings`; each document's own otherwise.

        Raises:
          UserError: anything out of bounds, or latents that this model does not know.
        """
        documents = [documents] if isinstance(documents, LatentDocument) else list(documents)
        _check_count(len(documents), "documents")
        plain = [self.defaults.of_document(doc).replace(settings) for doc in documents]
        batch = self._batch_size(batch_size, len(documents))
        seeds = [doc.seed if seed is None else seed for doc in documents]
        for value in seeds:
            _check_range("seed", value, 0, MAX_SEED)
        documents = [
            dataclasses.replace(doc, seed=s, batch_size=batch, **self._hashes, **chosen.denoising())
            for doc, s, chosen in zip(documents, seeds, plain, strict=True)
        ]
        captions = self._caption_tokens([doc.caption for doc in documents])
        latents = np.stack([self._latent_tokens(doc) for doc in documents])
        states = _Encoded(self, captions, batch)
        samples = np.zeros((len(documents), *self._process.shapes[0]), np.float32)
        for chosen in dict.fromkeys(plain):
            rows = np.array([i for i, other in enumerate(plain) if other == chosen])
            for part in _batches(rows, batch):
                result = self._render(
                    states.rows(part, batch), latents, seeds, documents, part, batch, chosen
                )
                samples[part] = result[: len(part)]
        images = to_uint8(samples, self.config.data.pixel_centre, self.config.data.pixel_scale)
        return Output(images, samples, documents, [])

    # ---- stages on batches ----------------------------------------------------------------

    def _render(
        self,
        encoded: Conditioning,
        latents: Int[np.ndarray, "n lz"],
        seeds: Sequence[int],
        documents: Sequence[LatentDocument],
        part: Int[np.ndarray, "rows"],
        batch: int,
        chosen: Settings,
    ) -> Float[np.ndarray, "b h w c"]:
        indices = np.array([documents[i].sample_index for i in part], np.uint32)
        with mesh_lib.use_mesh(self._mesh):
            pyramid = stages.render(
                self._model,
                self._params,
                self._process,
                chosen.plan(),
                encoded,
                self._put(latents[part], batch) if self.names else None,
                self._null_condition(),
                self._put(np.array([seeds[i] for i in part], np.uint32), batch),
                self._put(indices, batch),
                np.float32(chosen.guidance_weight),
                np.array(chosen.guidance_interval, np.float32),
            )
        return np.asarray(pyramid[0])

    def _draw(
        self,
        prompts: str | Sequence[str],
        num_images: int,
        seed: int,
        first_index: int,
        batch_size: int | None,
        settings: Mapping[str, Any],
    ) -> tuple[list[LatentDocument], list[str]]:
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise UserError("prompts must be a string or a list of strings")
        prompts = [clean_prompt(prompt, f"prompt {i + 1}") for i, prompt in enumerate(prompts)]
        _check_range("num_images", num_images, 1, MAX_PICTURES)
        _check_count(len(prompts) * num_images, "pictures")
        _check_range("seed", seed, 0, MAX_SEED)
        _check_range("first_index", first_index, 0, MAX_INDEX - num_images)
        chosen = self.defaults.replace(settings)
        count = len(prompts) * num_images
        batch = self._batch_size(batch_size, count)
        blank = [
            LatentDocument(
                caption=prompt,
                latents={},
                seed=seed,
                sample_index=first_index + i,
                batch_size=batch,
                **self._hashes,
                **chosen.denoising(),
            )
            for prompt in prompts
            for i in range(num_images)
        ]
        if not self.names:
            return blank, []
        return self._write_latents(blank, chosen, batch)

    def _write_latents(
        self, blank: list[LatentDocument], chosen: Settings, batch: int
    ) -> tuple[list[LatentDocument], list[str]]:
        """Fills in z; what is not valid is drawn again, with other random numbers, a few times."""
        states = _Encoded(self, self._caption_tokens([doc.caption for doc in blank]), batch)
        documents = list(blank)
        problems: dict[int, list[str]] = {}
        pending = np.arange(len(blank))
        for attempt in range(MAX_DRAWS):
            for part in _batches(pending, batch):
                ids, log_prob = self._decode(
                    states.rows(part, batch), blank, part, batch, chosen, attempt
                )
                for i, row, value in zip(part, ids, log_prob, strict=False):
                    latents, problems[i] = read_latents(self._vocabulary, row, self.names)
                    decoding = {
                        "temperature": chosen.temperature,
                        "top_k": chosen.top_k,
                        "top_p": chosen.top_p,
                        "seed": blank[i].seed,
                        "draws": attempt + 1,
                    }
                    if problems[i]:
                        decoding["problems"] = [problem[:200] for problem in problems[i]]
                    documents[i] = dataclasses.replace(
                        blank[i], latents=latents, decoding=decoding, log_prob=float(value)
                    )
            pending = np.array([i for i in pending if problems[i]], int)
            if not pending.size:
                break
        warnings = [
            f"picture {i} ({documents[i].caption[:60]!r}, index {documents[i].sample_index}):"
            f" latents not valid in {MAX_DRAWS} draws: {'; '.join(problems[i])}"
            for i in pending
        ]
        return documents, warnings

    def _decode(
        self,
        encoded: Conditioning,
        blank: Sequence[LatentDocument],
        part: Int[np.ndarray, "rows"],
        batch: int,
        chosen: Settings,
        attempt: int,
    ) -> tuple[Int[np.ndarray, "b lz"], Float[np.ndarray, "b"]]:
        with mesh_lib.use_mesh(self._mesh):
            ids, log_prob = stages.draw_latents(
                self._model,
                self._params,
                self._latent_length,
                encoded,
                self._put(np.array([blank[i].seed for i in part], np.uint32), batch),
                self._put(np.array([blank[i].sample_index for i in part], np.uint32), batch),
                np.uint32(attempt),
                np.float32(chosen.temperature),
                np.int32(min(chosen.top_k, self._allowed.size)),
                np.float32(chosen.top_p),
                self._allowed,
            )
        return np.asarray(ids), np.asarray(log_prob)

    def _null_condition(self) -> Any:
        if self._null is None:
            length = self.config.data.caption_length
            length += self._latent_length + 1 if self.names else 0
            self._null = stages.null_condition(self._model, self._params, length)
        return self._null

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
        return latent_ids(self._vocabulary, document.latents, self.names, self._latent_length)

    def _batch_size(self, batch_size: int | None, count: int) -> int:
        if batch_size is None:
            batch_size = min(count, DEFAULT_BATCH)
        _check_range("batch_size", batch_size, 1, MAX_PICTURES)
        return -(-batch_size // self._rows) * self._rows

    def _put(self, array: np.ndarray, batch: int) -> jax.Array:
        padded = stages.pad_rows(array, batch)
        return jax.device_put(padded, mesh_lib.batch_sharding(self._mesh))


class _Encoded:
    """Encoder states of the distinct captions, computed once and kept on the host."""

    def __init__(self, pipe: Pipeline, caption_tokens: Int[np.ndarray, "n lc"], batch: int):
        self._pipe = pipe
        distinct, self._where = np.unique(caption_tokens, axis=0, return_inverse=True)
        self._where = self._where.reshape(-1)
        size = pipe._batch_size(min(batch, len(distinct)), batch)
        parts = []
        with mesh_lib.use_mesh(pipe._mesh):
            for part in _batches(np.arange(len(distinct)), size):
                encoded = stages.encode(pipe._model, pipe._params, pipe._put(distinct[part], size))
                parts.append(jax.tree.map(np.asarray, encoded))
        # Rows that only fill the last batch come at its end, where no index points.
        self._encoded = jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)

    def rows(self, part: Int[np.ndarray, "rows"], batch: int) -> Conditioning:
        """States of some pictures' captions, on the devices, padded to the batch."""
        where = self._where[part]
        return jax.tree.map(lambda x: self._pipe._put(x[where], batch), self._encoded)


def _batches(rows: Int[np.ndarray, "n"], size: int) -> Iterator[Int[np.ndarray, "rows"]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _check_range(name: str, value: Any, low: int, high: int) -> None:
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not whole or not low <= value <= high:
        raise UserError(f"{name} is {value!r}; it must be a whole number between {low} and {high}")


def _check_count(count: int, what: str) -> None:
    if not 1 <= count <= MAX_PICTURES:
        raise UserError(f"{count} {what} asked for; between 1 and {MAX_PICTURES} in all")
