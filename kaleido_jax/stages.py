"""The compiled stages of generation: captions -> states, states -> z, (states, z) -> pictures.

Each is pure and jitted once per model and shape. Seeds, guidance weight and the filters of the
decoder are traced, so a sweep over them compiles nothing anew.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import flax.traverse_util as traverse
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key
from ml_collections import ConfigDict

from kaleido_jax import compiling, decode, diffusion, grammar, guidance, mesh, rng, samplers, tokens
from kaleido_jax.errors import UserError
from kaleido_jax.models.kaleido import Kaleido, join
from kaleido_jax.samplers import State
from kaleido_jax.schedule import Schedule, shifted_schedules, time_grid
from kaleido_jax.types import Conditioning, Params, Pyramid


@dataclasses.dataclass(frozen=True)
class Process:
    """What of a model's diffusion the sampler must know; fixed by the model's config.

    Attributes:
      schedules: one per resolution, highest first.
      prediction: what the network predicts: 'v', 'eps' or 'x0'.
      shapes: (height, width, channels) of each resolution.
    """

    schedules: tuple[Schedule, ...]
    prediction: str
    shapes: tuple[tuple[int, int, int], ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What decides the compiled sampling loop, hence static.

    Attributes:
      sampler: name in samplers.SAMPLERS.
      num_steps: number of steps of the time grid.
      grid: name in schedule.TIME_GRIDS.
      threshold: name in thresholds.THRESHOLDS.
      eta: DDIM's stochasticity; 0 for other samplers.
      guided: whether the unconditional branch is computed at all.
      interval: whether it is computed within an interval of t only.
      separate: whether the latents have a weight of their own (a third branch).
      projected: whether guidance is APG.
      rescaled: whether guidance is rescaled.
      annealed: whether CADS disturbs the condition.
    """

    sampler: str
    num_steps: int
    grid: str
    threshold: str
    eta: float
    guided: bool
    interval: bool
    separate: bool
    projected: bool
    rescaled: bool
    annealed: bool


class Dials(NamedTuple):
    """Numbers of the guidance; traced, and read where the plan says that they matter."""

    guidance_weight: float | Float[Array, ""]
    interval: Float[Array, "2"]
    latent_weight: float | Float[Array, ""]
    projection: guidance.Projection
    rescale: float | Float[Array, ""]
    annealing: guidance.Annealing


class Prepared(NamedTuple):
    """What the sampling loop of a batch reads; from `prepare`."""

    condition: Any
    null: Any
    caption_only: Any
    sample_keys: Key[Array, "b"]
    cads_keys: Key[Array, "b"]


def process_of(config: ConfigDict, ratios: tuple[int, ...]) -> Process:
    """The process of a model's config; `ratios` are its denoiser's."""
    data, d = config.data, config.diffusion
    sides = [data.image_size * r // ratios[0] for r in ratios]
    return Process(
        schedules=shifted_schedules(d.schedule, ratios, d.shift_power, d.shifted),
        prediction=d.prediction,
        shapes=tuple((side, side, data.channels) for side in sides),
    )


def sample_keys(
    seeds: Int[Array, "b"], name: str, indices: Int[Array, "b"], attempt: int | Int[Array, ""] = 0
) -> Key[Array, "b"]:
    """One key per sample, a function of (its seed, stream name, its index, attempt) alone."""

    def one(seed: Int[Array, ""], index: Int[Array, ""]) -> Key[Array, ""]:
        return rng.per_sample(rng.stream(seed, name, attempt), index[None])[0]

    return jax.vmap(one)(seeds, indices)


@functools.partial(compiling.jit, static_argnums=0)
def encode(model: Kaleido, params: Params, caption_tokens: Int[Array, "b lc"]) -> Conditioning:
    """Encoder states of captions."""
    return model.apply({"params": params}, caption_tokens, method="encode")


@functools.partial(compiling.jit, static_argnums=(0, 2))
def null_condition(model: Kaleido, params: Params, length: int) -> Any:
    """The null condition as the denoiser reads it, for a batch of one."""
    variables = {"params": params}
    null = model.apply(variables, 1, length, method="null_condition")
    return model.apply(variables, null, method="encode_condition")


@functools.partial(compiling.jit, static_argnums=(0, 2))
def draw_latents(
    model: Kaleido,
    params: Params,
    length: int,
    encoded: Conditioning,
    seeds: Int[Array, "b"],
    indices: Int[Array, "b"],
    attempt: Int[Array, ""],
    temperature: Float[Array, ""],
    top_k: Int[Array, ""],
    top_p: Float[Array, ""],
    allowed: Bool[Array, "v"] | None,
    constraint: grammar.Tables | None = None,
    plan: decode.Plan | None = None,
) -> tuple[Int[Array, "b lz"], Float[Array, "b"]]:
    """Samples z ~ p(z | c) with a key-value cache; returns (tokens, log p(z | c)).

    With a constraint every sequence is a sentence of its grammar, and `plan` may give part of it.
    """
    empty = jnp.zeros((seeds.shape[0], length), jnp.int32)
    _, variables = model.apply(
        {"params": params}, empty, encoded, method="decode_step", mutable=["cache"]
    )

    def step(cache: Any, token: Int[Array, "b"]) -> tuple[Float[Array, "b v"], Any]:
        (_, logits), new = model.apply(
            {"params": params, "cache": cache},
            token[:, None],
            encoded,
            method="decode_step",
            mutable=["cache"],
        )
        return logits[:, 0], new["cache"]

    return decode.sample_tokens(
        step,
        variables["cache"],
        sample_keys(seeds, "decode", indices, attempt),
        length,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        allowed=allowed,
        grammar=constraint,
        plan=plan,
    )


@functools.partial(compiling.jit, static_argnums=0)
def score_latents(
    model: Kaleido, params: Params, latent_tokens: Int[Array, "b lz"], encoded: Conditioning
) -> Float[Array, "b lz"]:
    """log p of each token of z given c and those before it (Eq. 7, first factor); 0 at padding."""
    _, logits, _ = model.apply({"params": params}, latent_tokens, encoded, method="latent_states")
    log_prob = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
    own = jnp.take_along_axis(log_prob, latent_tokens[..., None], axis=-1)[..., 0]
    return jnp.where(latent_tokens != tokens.PAD, own, 0.0)


@functools.partial(compiling.jit, static_argnums=(0, 2, 3))
def prepare(
    model: Kaleido,
    params: Params,
    process: Process,
    plan: Plan,
    encoded: Conditioning,
    latent_tokens: Int[Array, "b lz"] | None,
    null: Any,
    seeds: Int[Array, "b"],
    indices: Int[Array, "b"],
) -> tuple[Prepared, State]:
    """The conditions of a batch and its noise.

    Args:
      encoded: encoder states of the captions.
      latent_tokens: z; None for a model without latents.
      null: from `null_condition`.
    """
    variables = {"params": params}

    def as_read(condition: Conditioning) -> Any:
        return model.apply(variables, condition, method="encode_condition")

    caption_only = None
    if latent_tokens is None:
        condition = as_read(encoded)
    else:
        hidden, _, mask = model.apply(variables, latent_tokens, encoded, method="latent_states")
        condition = as_read(join(encoded, Conditioning(states=hidden, mask=mask)))
        if plan.separate:
            without = Conditioning(states=hidden, mask=jnp.zeros_like(mask))
            caption_only = as_read(join(encoded, without))
    if plan.guided:
        null = jax.tree.map(lambda row, like: jnp.broadcast_to(row, like.shape), null, condition)
    keys = sample_keys(seeds, "sample", indices)
    prepared = Prepared(
        condition=condition,
        null=null if plan.guided else None,
        caption_only=caption_only,
        sample_keys=keys,
        cads_keys=sample_keys(seeds, "cads", indices),
    )
    noise = samplers.sample_noise(keys, 0, process.shapes)
    rows = seeds.shape[0]
    memory = guidance.first_memory(plan.projected and plan.guided, rows, process.shapes)
    return prepared, samplers.begin(noise, memory)


@functools.partial(compiling.jit, static_argnums=(0, 2, 3))
def advance(
    model: Kaleido,
    params: Params,
    process: Process,
    plan: Plan,
    prepared: Prepared,
    dials: Dials,
    state: State,
    first: Int[Array, ""],
    end: Int[Array, ""],
) -> State:
    """Takes the steps first..end - 1 of x ~ p(x | z, c), all resolutions at once (Eq. 7).

    The steps are traced, so that any parts of the loop are one program.
    """
    guided = guidance.guide(
        functools.partial(denoise, model, params, process),
        prepared.condition,
        prepared.null,
        dials.guidance_weight,
        dials.interval if plan.interval else None,
        caption_only=prepared.caption_only,
        latent_weight=dials.latent_weight if plan.separate else None,
        projection=dials.projection if plan.projected else None,
        rescale=dials.rescale if plan.rescaled else None,
        annealing=dials.annealing if plan.annealed else None,
        keys=prepared.cads_keys,
    )
    options = {"eta": plan.eta} if plan.sampler == "ddim" else {}
    return samplers.SAMPLERS[plan.sampler](
        guided,
        state,
        time_grid(plan.num_steps, plan.grid, process.schedules[-1]),
        process.schedules,
        prepared.sample_keys,
        plan.threshold,
        steps=(first, end),
        **options,
    )


def render(
    model: Kaleido,
    params: Params,
    process: Process,
    plan: Plan,
    encoded: Conditioning,
    latent_tokens: Int[Array, "b lz"] | None,
    null: Any,
    seeds: Int[Array, "b"],
    indices: Int[Array, "b"],
    dials: Dials,
) -> Pyramid:
    """All steps at once: float32 images in model space; arguments as `prepare`, `advance`."""
    prepared, state = prepare(
        model, params, process, plan, encoded, latent_tokens, null, seeds, indices
    )
    return advance(model, params, process, plan, prepared, dials, state, 0, plan.num_steps).x_t


def denoise(
    model: Kaleido,
    params: Params,
    process: Process,
    x_t: Pyramid,
    level: Int[Array, ""],
    condition: Any,
) -> Pyramid:
    """The network's predictions as clean images; it reads time_index = level - 1."""
    time_index = jnp.full((x_t[0].shape[0],), level - 1, jnp.float32)
    predictions = model.apply({"params": params}, x_t, time_index, condition, method="denoise")
    return tuple(
        diffusion.to_x0(
            process.prediction, prediction.astype(jnp.float32), x, *schedule.alpha_sigma(level)
        )
        for prediction, x, schedule in zip(predictions, x_t, process.schedules, strict=True)
    )


def pad_rows(array: np.ndarray, size: int) -> np.ndarray:
    """Repeats the last row until there are `size`, so that every batch has one shape."""
    missing = size - array.shape[0]
    return np.concatenate([array, np.repeat(array[-1:], missing, axis=0)]) if missing else array


def place_params(model: Kaleido, params: Params, devices: Mesh, *example: Any) -> Params:
    """Parameters sharded over a mesh, once they are known to be the model's.

    Args:
      model: what they belong to.
      params: from a bundle.
      devices: the mesh.
      example: arguments of `model.__call__`; only their shapes matter.

    Raises:
      UserError: one line with every name that is missing, unknown or of another shape.
    """
    boxed = jax.eval_shape(model.init, jax.random.key(0), *example)["params"]
    want = traverse.flatten_dict(nn.meta.unbox(boxed), sep="/")
    have = traverse.flatten_dict(dict(params), sep="/")
    lacking = {name.partition("/")[0] for name in want} - {n.partition("/")[0] for n in have}
    problems = [f"{part} is missing whole" for part in sorted(lacking)]
    problems += [
        f"{name} is missing"
        for name in want
        if name not in have and name.partition("/")[0] not in lacking
    ]
    for name, value in have.items():
        if name not in want:
            near = difflib.get_close_matches(name, want, n=1)
            problems.append(f"{name} is unknown" + (f" (near {near[0]})" if near else ""))
        elif value.shape != want[name].shape:
            shape = list(want[name].shape)
            problems.append(f"{name} has shape {list(value.shape)}, should be {shape}")
    if problems:
        raise UserError(f"the weights do not fit the config: {'; '.join(problems)}")
    return jax.device_put(params, mesh.param_shardings(boxed, devices))
