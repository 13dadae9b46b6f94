"""Training: one pure, jitted, sharded step. The loop around it is in training_loop.py."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, Int64
from ml_collections import ConfigDict

from kaleido_jax import compiling, guards, losses, mesh, optim, quantize, rng, trainable
from kaleido_jax.data import Loader, make_source
from kaleido_jax.data.reader import MAX_BAD_FRACTION
from kaleido_jax.errors import UserError
from kaleido_jax.losses import LossConfig
from kaleido_jax.models.kaleido import Kaleido, KaleidoConfig
from kaleido_jax.tokens import SECTIONS, Vocabulary
from kaleido_jax.types import Batch, Params


@flax.struct.dataclass
class TrainState:
    """Everything that training changes, and the frozen parameters beside it.

    Attributes:
      step: updates done so far.
      params: trained parameters. frozen: parameters without gradient or optimizer slots.
      opt_state: of `optim.make_optimizer`, over `params` alone.
      ema: running average of `params`.
      norms: running mean of gradient norms, where `train.skip_spike` asks for it.
    """

    step: Int[Array, ""]
    params: Params
    frozen: Params
    opt_state: Any
    ema: Params
    norms: guards.NormMean | None = None

    def as_dict(self) -> dict[str, Any]:
        """The tree that a checkpoint holds."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: value for name, value in fields.items() if value is not None}


class Trainer:
    """The pure functions of one run, compiled for one mesh."""

    def __init__(self, config: ConfigDict, devices: Any = None):
        self.config = config
        self.model = Kaleido(KaleidoConfig.from_config(config))
        self.trainable = trainable.Trainable.from_config(config)
        self.mesh = mesh.make_mesh(**config.mesh.to_dict(), devices=devices)
        self.loss_config = LossConfig.from_config(config, self.model.cfg.ratios)
        self.optimizer = optim.make_optimizer(config)
        self.skip_spike = float(config.train.get("skip_spike", 0.0))
        self.parts = config.train.get("accumulate", 1)
        self.frozen_storage = quantize.storage_of(config)
        self._check_batch()
        boxed = jax.eval_shape(self._init_boxed)
        self.param_shardings = mesh.param_shardings(boxed, self.mesh)
        self.shardings = self._state_shardings(nn.meta.unbox(boxed))

    def _check_batch(self) -> None:
        size = self.config.train.batch_size
        rows = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        if self.parts < 1:
            raise UserError(f"config key 'train.accumulate' is {self.parts}; it must be at least 1")
        if size % (rows * self.parts):
            parts = f" times the {self.parts} parts of train.accumulate" if self.parts > 1 else ""
            raise UserError(
                f"config key 'train.batch_size' is {size}; it must be a multiple of the {rows} "
                f"devices that share a batch{parts}"
            )
        if size % (self._unit * self.parts):
            raise UserError(
                f"config key 'train.batch_size' is {size}; it must be a multiple of the sum of "
                f"train.mixed_ratio, {self._unit}, times train.accumulate, {self.parts}"
            )

    @property
    def _unit(self) -> int:
        """Rows that a mixed batch divides among its resolutions."""
        return sum(self.loss_config.mixed_ratio) or 1

    def _init_boxed(self) -> Any:
        d, ratios = self.config.data, self.model.cfg.ratios
        sides = [d.image_size * r // ratios[0] for r in ratios]
        key = rng.stream(self.config.seed, "params")
        variables = self.model.init(
            key,
            jnp.ones((1, d.caption_length), jnp.int32),
            jnp.ones((1, d.latent_length if self.config.latents else 0), jnp.int32),
            tuple(jnp.zeros((1, side, side, d.channels)) for side in sides),
            jnp.zeros((1,)),
        )
        return variables["params"]

    def _state_shardings(self, abstract: Params) -> TrainState:
        whole = mesh.replicated(self.mesh)
        trained, frozen = trainable.split(self.param_shardings, self.trainable)
        frozen = quantize.of_encoder(quantize.store_shardings, frozen, self.frozen_storage)
        shapes, _ = jax.eval_shape(lambda tree: trainable.split(tree, self.trainable), abstract)
        slots = jax.eval_shape(self.optimizer.init, shapes)
        opt_state = optax.tree.map_params(
            self.optimizer,
            lambda _, sharding: sharding,
            slots,
            trained,
            transform_non_params=lambda _: whole,
        )
        norms = guards.NormMean(whole, whole) if self.skip_spike else None
        return TrainState(whole, trained, frozen, opt_state, trained, norms)

    def _init(self) -> TrainState:
        params = nn.meta.unbox(self._init_boxed())
        params, frozen = trainable.split(params, self.trainable)
        frozen = quantize.of_encoder(quantize.store, frozen, self.frozen_storage)
        # The average starts at the parameters, in memory of its own (the state is donated).
        ema = jax.tree.map(jnp.copy, params)
        slots = self.optimizer.init(params)
        return TrainState(jnp.zeros((), jnp.int32), params, frozen, slots, ema, self._init_norms())

    def _init_norms(self) -> guards.NormMean | None:
        return guards.NormMean.zero() if self.skip_spike else None

    def init_norms(self) -> guards.NormMean | None:
        """A new mean of gradient norms, for a state that was saved without one."""
        return jax.jit(self._init_norms, out_shardings=self.shardings.norms)()

    def init(self) -> TrainState:
        """A new state from `config.seed`, already sharded."""
        with mesh.use_mesh(self.mesh):
            return jax.jit(self._init, out_shardings=self.shardings)()

    def abstract_state(self) -> TrainState:
        """Shapes, types and shardings of the state, without memory for it."""
        shapes = jax.eval_shape(self._init)
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            shapes,
            self.shardings,
        )

    def loss(
        self, params: Params, frozen: Params, batch: Batch, step: Int[Array, ""]
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """L = L_DM + eta L_AR of one global batch at `step`; pure."""
        merged = trainable.merge(params, frozen)
        cfg = self.loss_config
        return losses.joint_loss(self.model, merged, batch, self.config.seed, step, cfg)

    def gradients(self, state: TrainState, batch: Batch) -> tuple[Params, dict[str, Any]]:
        """Gradients of `loss` and its metrics, over `train.accumulate` parts one after the other.

        The random numbers are those of the whole batch (what a network's dropout leaves out is
        drawn for each part), and a part weighs what its rows and tokens are of it.
        """
        if self.parts == 1:
            return jax.grad(self.loss, has_aux=True)(state.params, state.frozen, batch, state.step)
        seed, cfg = self.config.seed, self.loss_config
        draws = losses.draw(batch, seed, state.step, cfg)
        count = losses.count_tokens(batch.latent_tokens)
        dropout = rng.stream(seed, "dropout", state.step)

        def loss(params: Params, part: Batch, own: losses.Draws, key: Any) -> Any:
            merged, share = trainable.merge(params, state.frozen), 1 / self.parts
            return losses.drawn_loss(self.model, merged, part, own, key, cfg, share, count)

        def add(total: Any, inputs: Any) -> tuple[Any, None]:
            number, part, own = inputs
            key = jax.random.fold_in(dropout, number)
            new = jax.grad(loss, has_aux=True)(state.params, part, own, key)
            grads, metrics = jax.tree.map(jnp.add, total, new)
            return (jax.lax.with_sharding_constraint(grads, self.shardings.params), metrics), None

        inputs = (jnp.arange(self.parts), *jax.tree.map(self._in_parts, (batch, draws)))
        _, part, own = jax.tree.map(lambda x: x[0], inputs)
        _, metrics = jax.eval_shape(loss, state.params, part, own, dropout)
        zeros = jax.tree.map(jnp.zeros_like, (state.params, metrics))
        return jax.lax.scan(add, zeros, inputs)[0]

    def _in_parts(self, x: Array) -> Array:
        """[b, ..] as [parts, b / parts, ..]; every part has rows of every device."""
        units = x.reshape(-1, self.parts, self._unit, *x.shape[1:])
        parts = jnp.moveaxis(units, 1, 0).reshape(self.parts, -1, *x.shape[1:])
        rows = mesh.batch_sharding(self.mesh).spec
        return jax.lax.with_sharding_constraint(parts, PartitionSpec(None, *rows))

    def update(
        self, state: TrainState, batch: Batch
    ) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
        """One update of the state; pure. One that `guards.judge` drops only moves the step on."""
        grads, metrics = self.gradients(state, batch)
        updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        o = self.config.optim
        ema = optim.update_ema(state.ema, params, state.step, o.ema_decay, o.ema_warmup)
        metrics["grad_norm"] = norm = optax.global_norm(grads)
        keep, norms, counts = guards.judge(metrics["loss"], norm, state.norms, self.skip_spike)
        params, opt_state, ema = guards.choose(
            keep, (params, opt_state, ema), (state.params, state.opt_state, state.ema)
        )
        new = TrainState(state.step + 1, params, state.frozen, opt_state, ema, norms)
        return new, metrics | counts

    @functools.cached_property
    def compiled_update(self) -> Callable:
        """`update` as one program that reuses the state's memory."""
        return compiling.jit(
            self.update,
            in_shardings=(self.shardings, mesh.batch_sharding(self.mesh)),
            out_shardings=(self.shardings, mesh.replicated(self.mesh)),
            donate_argnums=0,
        )

    def step(
        self, state: TrainState, batch: Batch
    ) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
        """Runs `compiled_update` on a global batch; the old state is consumed."""
        with mesh.use_mesh(self.mesh):
            return self.compiled_update(state, batch)

    def put(self, batch: Batch) -> Batch:
        """Makes a global, sharded batch of this process's `rows`."""
        sharding, size, rows = (
            mesh.batch_sharding(self.mesh),
            self.config.train.batch_size,
            self.rows,
        )

        def whole(x: Any) -> Array:
            def part(index: tuple[slice, ...]) -> Any:
                return x[np.searchsorted(rows, np.arange(size)[index[0]])]

            return jax.make_array_from_callback((size, *x.shape[1:]), sharding, part)

        return jax.tree.map(whole, batch)

    @functools.cached_property
    def rows(self) -> Int64[np.ndarray, " rows"]:
        """Rows of each global batch that this process reads."""
        return mesh.local_rows(self.mesh, self.config.train.batch_size)


def make_loader(
    config: ConfigDict,
    vocabulary: Vocabulary,
    rows: Int64[np.ndarray, " rows"] | None = None,
) -> Loader:
    """The loader of `config.data`, of all rows of each batch or of `rows` alone.

    Raises:
      UserError: data or vocabulary that do not fit.
    """
    for part, needed in (
        ("text_encoder", vocabulary.num_pieces),
        ("latent_decoder", vocabulary.size),
    ):
        have = config.model[part].vocab_size
        if have < needed and (part == "text_encoder" or config.latents):
            raise UserError(
                f"config key 'model.{part}.vocab_size' is {have}; this vocabulary needs {needed}"
            )
    counted = tuple(config.model.get("section_tokens", ()))
    if counted and counted != (vocabulary.section_offset, len(SECTIONS)):
        raise UserError(
            f"config key 'model.section_tokens' is {counted}; those of this vocabulary are "
            f"{vocabulary.section_offset, len(SECTIONS)}"
        )
    d = config.data
    source = make_source(d.source, d.image_size, tuple(config.latents))
    return Loader(
        source,
        vocabulary,
        latents=tuple(config.latents),
        caption_length=d.caption_length,
        latent_length=d.latent_length if config.latents else 0,
        image_size=d.image_size,
        batch_size=config.train.batch_size,
        seed=config.seed,
        rows=rows,
        # A source that bears missing files must be readable without them.
        max_bad_fraction=d.source.get("max_bad_fraction", MAX_BAD_FRACTION),
    )
