"""How fast a training step is: the whole of it, the denoiser alone, beside the baseline."""

from __future__ import annotations

import dataclasses
import importlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from kaleido_jax import compiling, flops, mesh, optim
from kaleido_jax import config as config_lib
from kaleido_jax.bench import measured
from kaleido_jax.errors import UserError
from kaleido_jax.train import Trainer
from kaleido_jax.types import Batch


@dataclass(frozen=True)
class Settings:
    """What to measure with.

    Attributes:
      batch_size: of all devices together; 0 is the config's.
      repeats: steps that are timed one by one. warmup: steps before them.
      denoiser_only: the denoiser, a squared error and Adam, without text, averages and clipping.
      baseline: measures the same batch without latents too.
      memory_limit: bytes; a program for which the compiler asks more is not run. 0 is no limit.
      profile: folder for a trace of the timed steps.
    """

    batch_size: int = 0
    repeats: int = 10
    warmup: int = 2
    denoiser_only: bool = False
    baseline: bool = False
    memory_limit: int = 0
    profile: str | os.PathLike | None = None


@dataclass(frozen=True)
class Work:
    """A step that can be compiled and run.

    Attributes:
      step: jitted, (state, batch) -> (state, anything); it may consume the state.
      shapes: of (state, batch), with shardings.
      make: makes both.
      update: the same as `step`, as a function whose operations can be counted.
      parameters: of the model, trained and frozen.
    """

    step: Any
    shapes: tuple[Any, Any]
    make: Callable[[], tuple[Any, Any]]
    update: Callable[..., Any]
    parameters: int


def measure(config: ConfigDict, settings: Settings) -> dict[str, Any]:
    """Times training steps of a config on made-up pictures and texts of full length.

    Args:
      config: a checked config; its data are not read.

    Returns:
      step_seconds (median, min, max of single steps, each waited for), host_seconds_per_step (what
      all cores of the host spent, on a CPU the work itself), images_per_second,
      flops_per_step (by part of the model, what rematerialisation repeats apart),
      flops_per_second and utilisation (of what the model needs, without the repeated),
      compile_seconds, memory. With `baseline`: the same of the model without latents under
      'baseline', and time_ratio, flops_ratio and time_over_flops, the first over the second.

    Raises:
      UserError: a batch that the devices cannot share, no latents to leave out.
      measured.DoesNotFit: more memory is needed than there is.
    """
    if settings.baseline and (not config.latents or settings.denoiser_only):
        raise UserError("bench train: --baseline compares with latents; there are none here")
    if settings.batch_size:
        config = config.copy_and_resolve_references()
        with config.unlocked():
            config.train.batch_size = settings.batch_size
    result = _measure(config, settings)
    if not settings.baseline:
        return result
    without = config.copy_and_resolve_references()
    with without.unlocked():
        without.latents = ()
    plain = _measure(without, dataclasses.replace(settings, profile=None))
    ratio = result["step_seconds"]["median"] / plain["step_seconds"]["median"]
    work = _needed(result) / _needed(plain)
    kept = ("step_seconds", "images_per_second", "flops_per_step", "utilisation", "memory")
    return {
        **result,
        "baseline": {name: plain[name] for name in kept},
        "time_ratio": round(ratio, 4),
        "flops_ratio": round(work, 4),
        "time_over_flops": round(ratio / work, 4),
    }


def _measure(config: ConfigDict, settings: Settings) -> dict[str, Any]:
    trainer = Trainer(config)
    work = denoiser_alone(trainer) if settings.denoiser_only else whole_step(trainer)
    counts = flops.count(work.update, *work.shapes)
    rows = config.train.batch_size
    with mesh.use_mesh(trainer.mesh):
        program, compile_seconds = measured.compiled(work.step, *work.shapes)
        measured.check_fits(program, settings.memory_limit)
        state, batch = work.make()
        for _ in range(settings.warmup):
            state, _ = program(state, batch)
        jax.block_until_ready(state)
        times, busy = [], time.process_time()
        with measured.profiled(settings.profile):
            for _ in range(settings.repeats):
                seconds, (state, _) = measured.timed(lambda: program(state, batch))  # noqa: B023
                times.append(seconds)
        busy = (time.process_time() - busy) / settings.repeats
    step = measured.spread(times)
    return {
        "bench": "train",
        "what": "denoiser" if settings.denoiser_only else "step",
        "config_fingerprint": config_lib.fingerprint(config),
        "latents": list(config.latents),
        "image_size": config.data.image_size,
        "batch_size": rows,
        "mesh": dict(trainer.mesh.shape),
        "parameters": work.parameters,
        "repeats": settings.repeats,
        "step_seconds": step,
        "host_seconds_per_step": round(busy, 7),
        **measured.rates(step["median"], rows, flops.useful(counts)),
        "flops_per_step": counts,
        "compile_seconds": compile_seconds,
        "memory": measured.memory(program),
        **measured.environment(),
    }


def whole_step(trainer: Trainer) -> Work:
    """The step that `kaleido train` takes."""
    state, batch = trainer.abstract_state(), made_up_batch(trainer.config)
    sharding = mesh.batch_sharding(trainer.mesh)
    return Work(
        step=trainer.compiled_update,
        shapes=(state, _shapes(batch, sharding)),
        make=lambda: (trainer.init(), trainer.put(batch)),
        update=trainer.update,
        parameters=optim.count_parameters((state.params, state.frozen)),
    )


def denoiser_alone(trainer: Trainer) -> Work:
    """A step of the denoiser with a squared error on its images and plain Adam.

    Its inputs are noise, times and states of the length of caption and latents together; the
    parameters are copied on every device.
    """
    config = trainer.config
    cfg = trainer.model.cfg
    model = importlib.import_module(f"kaleido_jax.models.{cfg.backbone}").Model(cfg.denoiser)
    rows, data = config.train.batch_size, config.data
    sides = [data.image_size * ratio // cfg.ratios[0] for ratio in cfg.ratios]
    length = data.caption_length + (data.latent_length + 1 if config.latents else 0)
    noise = np.random.default_rng(0)
    images = tuple(
        noise.standard_normal((rows, side, side, data.channels), np.float32) for side in sides
    )
    states = noise.standard_normal((rows, length, cfg.text_encoder.emb_dim), np.float32)
    batch = (images, np.arange(rows) * 999.0 / rows, states, np.ones((rows, length), bool))
    batch = jax.tree.map(lambda x: x.astype(np.float32) if x.dtype == np.float64 else x, batch)
    adam = optax.adam(config.optim.learning_rate)

    def init() -> Any:
        row = jax.tree.map(lambda x: x[:1], batch)
        params = nn.meta.unbox(model.init(jax.random.key(0), *row)["params"])
        return params, adam.init(params)

    def loss(params: Any, batch: Any) -> Any:
        rngs = {"dropout": jax.random.key(1)}
        made = model.apply({"params": params}, *batch, train=True, rngs=rngs)
        return sum(jnp.mean((x - y) ** 2) for x, y in zip(made, batch[0], strict=True))

    def update(state: Any, batch: Any) -> Any:
        params, slots = state
        value, grads = jax.value_and_grad(loss)(params, batch)
        changes, slots = adam.update(grads, slots)
        return (optax.apply_updates(params, changes), slots), value

    copied, split = mesh.replicated(trainer.mesh), mesh.batch_sharding(trainer.mesh)
    shapes = jax.eval_shape(init)
    return Work(
        step=compiling.jit(update, donate_argnums=0),
        shapes=(_shapes(shapes, copied), _shapes(batch, split)),
        make=lambda: (jax.jit(init, out_shardings=copied)(), jax.device_put(batch, split)),
        update=update,
        parameters=optim.count_parameters(shapes[0]),
    )


def made_up_batch(config: ConfigDict) -> Batch:
    """A batch of noise and of random tokens, none of them padding: what costs most."""
    data, rows = config.data, config.train.batch_size
    draw = np.random.default_rng(0)

    def words(length: int, part: str) -> Any:
        return draw.integers(3, config.model[part].vocab_size, (rows, length)).astype(np.int32)

    shape = (rows, data.image_size, data.image_size, data.channels)
    return Batch(
        caption_tokens=words(data.caption_length, "text_encoder"),
        latent_tokens=words(data.latent_length if config.latents else 0, "latent_decoder"),
        image=draw.integers(0, 256, shape).astype(np.uint8),
        key_hash=np.zeros(rows, np.uint32),
    )


def _shapes(tree: Any, sharding: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def _needed(result: dict[str, Any]) -> int:
    return flops.useful(result["flops_per_step"])
