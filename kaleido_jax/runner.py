"""Runs the compiled stages of one model on batches: numpy in, numpy out, padding and placing.

What a batch means (documents, settings, retries) is the pipeline's affair.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int
from ml_collections import ConfigDict

from kaleido_jax import mesh as mesh_lib
from kaleido_jax import stages
from kaleido_jax.batches import MAX_PICTURES, Captions, Encoded, check_range
from kaleido_jax.decode import Plan
from kaleido_jax.errors import UserError
from kaleido_jax.grammar import Tables
from kaleido_jax.models.kaleido import Kaleido, KaleidoConfig
from kaleido_jax.settings import Settings
from kaleido_jax.types import Conditioning, Params

DEFAULT_BATCH = 16
# Steps between two calls of `on_step`: the most that run on after it has raised.
PREVIEW_EVERY = 2
# (steps taken, predictions of the clean pictures so far).
OnBatchStep = Callable[[int, Float[np.ndarray, "rows h w c"]], None]


class Runner:
    """A model on a mesh.

    Attributes:
      params: its parameters, sharded.
      shapes: (height, width, channels) of each resolution, highest first.
      latent_length: tokens of z; 0 for a model without latents.
      vocab_size: of the latent decoder, rows that no token uses included.
    """

    def __init__(self, config: ConfigDict, params: Params, mesh: Mesh | None):
        """Places the parameters on the mesh, by default all devices as one data axis.

        Raises:
          UserError: parameters that do not fit the config, all differences listed.
        """
        self._model = Kaleido(KaleidoConfig.from_config(config))
        self._mesh = mesh_lib.make_mesh() if mesh is None else mesh
        self._multiple = self._mesh.shape["data"] * self._mesh.shape["fsdp"]
        data = config.data
        decoder = self._model.cfg.latent_decoder
        self.latent_length = data.latent_length if decoder else 0
        self.vocab_size = decoder.vocab_size if decoder else 0
        self._process = stages.process_of(config, self._model.cfg.ratios)
        self.shapes = self._process.shapes
        self.params = stages.place_params(
            self._model,
            params,
            self._mesh,
            jnp.ones((1, data.caption_length), jnp.int32),
            jnp.ones((1, self.latent_length), jnp.int32),
            tuple(jnp.zeros((1, *shape)) for shape in self.shapes),
            jnp.zeros((1,)),
        )
        # Caption, and of z one state more than tokens: the decoder's start.
        self._null_length = data.caption_length + (self.latent_length + 1 if decoder else 0)
        self._null = None
        self._captions = Captions()

    def batch_size(self, wanted: int | None, count: int) -> int:
        """Rows of a batch: `wanted` or a fit for `count` pictures, rounded up to the devices.

        The fit is a power of two for each device, so that few programs are compiled.
        """
        if wanted is None:
            rows = -(-min(max(count, 1), DEFAULT_BATCH) // self._multiple)
            return (1 << (rows - 1).bit_length()) * self._multiple
        check_range("batch_size", wanted, 1, MAX_PICTURES)
        return -(-wanted // self._multiple) * self._multiple

    def encode(self, captions: Int[np.ndarray, "n lc"]) -> Encoded:
        """Encoder states of captions, each distinct one once; the last ones are remembered.

        Every device encodes one caption at a time, whatever else is asked for: the states, and so
        a picture, depend on the caption alone to the bit. It costs little beside the pictures.
        """

        def encode(rows: Int[np.ndarray, "rows lc"]) -> Conditioning:
            with mesh_lib.use_mesh(self._mesh):
                made = stages.encode(self._model, self.params, self._put(rows, self._multiple))
            return jax.tree.map(lambda x: np.asarray(x)[: len(rows)], made)

        return self._captions.encode(captions, encode, self._multiple)

    def decode(
        self,
        encoded: Encoded,
        part: Int[np.ndarray, "rows"],
        seeds: Int[np.ndarray, "rows"],
        indices: Int[np.ndarray, "rows"],
        batch: int,
        settings: Settings,
        attempt: int,
        rules: Bool[np.ndarray, "v"] | Tables,
        plan: Plan | None = None,
    ) -> tuple[Int[np.ndarray, "rows lz"], Float[np.ndarray, "rows"]]:
        """Draws z for the pictures `part`; returns its tokens and log p(z | c).

        Args:
          encoded: states of all captions, which `part` indexes.
          seeds, indices: of the pictures, their random numbers.
          batch: rows of the compiled program, at least len(part).
          attempt: number of the draw.
          rules: tokens that z may hold, or the tables of its grammar (from `place`).
          plan: with a grammar, which part of z to draw; rows as `part`.
        """
        constrained = isinstance(rules, Tables)
        with mesh_lib.use_mesh(self._mesh):
            ids, log_prob = stages.draw_latents(
                self._model,
                self.params,
                self.latent_length,
                self._rows(encoded, part, batch),
                self._put(seeds.astype(np.uint32), batch),
                self._put(indices.astype(np.uint32), batch),
                np.uint32(attempt),
                np.float32(settings.temperature),
                np.int32(min(settings.top_k, self.vocab_size)),
                np.float32(settings.top_p),
                None if constrained else rules,
                rules if constrained else None,
                None if plan is None else Plan(*(self._put(rows, batch) for rows in plan)),
            )
        return np.asarray(ids)[: len(part)], np.asarray(log_prob)[: len(part)]

    def score(
        self,
        encoded: Encoded,
        part: Int[np.ndarray, "rows"],
        latents: Int[np.ndarray, "rows lz"],
        batch: int,
    ) -> Float[np.ndarray, "rows lz"]:
        """log p of each token of z given those before it and the caption; 0 at padding."""
        with mesh_lib.use_mesh(self._mesh):
            log_prob = stages.score_latents(
                self._model,
                self.params,
                self._put(latents, batch),
                self._rows(encoded, part, batch),
            )
        return np.asarray(log_prob)[: len(part)]

    def place(self, tables: Tables) -> Tables:
        """The tables on every device."""
        return jax.device_put(tables, mesh_lib.replicated(self._mesh))

    def render(
        self,
        encoded: Encoded,
        part: Int[np.ndarray, "rows"],
        latents: Int[np.ndarray, "rows lz"],
        seeds: Int[np.ndarray, "rows"],
        indices: Int[np.ndarray, "rows"],
        batch: int,
        settings: Settings,
        on_step: OnBatchStep | None = None,
    ) -> Float[np.ndarray, "rows h w c"]:
        """Pictures in model space at the highest resolution; arguments as `decode`.

        Args:
          latents: z of the pictures; empty rows for a model without latents.
          on_step: is told of every second step.

        Raises:
          UserError: a weight for latents that the model does not have.
        """
        plan = settings.plan()
        if plan.separate and not self.latent_length:
            raise UserError("latent_guidance_weight is set, but this model has no latents")
        stride = settings.num_steps if on_step is None else PREVIEW_EVERY
        with mesh_lib.use_mesh(self._mesh):
            prepared, state = stages.prepare(
                self._model,
                self.params,
                self._process,
                plan,
                self._rows(encoded, part, batch),
                self._put(latents, batch) if self.latent_length else None,
                self._null_condition() if plan.guided else None,
                self._put(seeds.astype(np.uint32), batch),
                self._put(indices.astype(np.uint32), batch),
            )
            for first in range(0, settings.num_steps, stride):
                end = min(first + stride, settings.num_steps)
                state = stages.advance(
                    self._model,
                    self.params,
                    self._process,
                    plan,
                    prepared,
                    settings.dials(),
                    state,
                    np.int32(first),
                    np.int32(end),
                )
                if on_step is not None:
                    on_step(end, np.asarray(state.x0[0])[: len(part)])
        return np.asarray(state.x_t[0])[: len(part)]

    def _null_condition(self) -> Any:
        if self._null is None:
            self._null = stages.null_condition(self._model, self.params, self._null_length)
        return self._null

    def _rows(self, encoded: Encoded, part: Int[np.ndarray, "rows"], batch: int) -> Any:
        return jax.tree.map(lambda x: self._put(x, batch), encoded.rows(part))

    def _put(self, array: np.ndarray, batch: int) -> jax.Array:
        padded = stages.pad_rows(array, batch)
        return jax.device_put(padded, mesh_lib.batch_sharding(self._mesh))
