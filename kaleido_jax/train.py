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
from jaxtyping import Array, Float, Int, Int64
from ml_collections import ConfigDict

from kaleido_jax import compiling, guards, mesh, optim, rng, trainable
from kaleido_jax.data import Loader, make_source
from kaleido_jax.data.reader import MAX_BAD_FRACTION
from kaleido_jax.errors import UserError
from kaleido_jax.losses import LossConfig, joint_loss
from kaleido_jax.models.kaleido import Kaleido, KaleidoConfig
from kaleido_jax.tokens import Vocabulary
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
        rows = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        if config.train.batch_size % rows:
            raise UserError(
                f"config key 'train.batch_size' is {config.train.batch_size}; it must be a "
                f"multiple of the {rows} devices that share a batch"
            )
        boxed = jax.eval_shape(self._init_boxed)
        self.param_shardings = mesh.param_shardings(boxed, self.mesh)
        self.shardings = self._state_shardings(nn.meta.unbox(boxed))

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
        return joint_loss(self.model, merged, batch, self.config.seed, step, self.loss_config)

    def update(
        self, state: TrainState, batch: Batch
    ) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
        """One update of the state; pure. One that `guards.judge` drops only moves the step on."""
        grad = jax.grad(self.loss, has_aux=True)
        grads, metrics = grad(state.params, state.frozen, batch, state.step)
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
