"""Decode and render as StableHLO: programs that run wherever a jax runtime does, without this code.

The weights are arguments (a dictionary by our names, as they lie in model.safetensors) and the
batch is symbolic, so one artifact serves any number of pictures. docs/weights.md has a loader.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.traverse_util as traverse
import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export
from jaxtyping import Array, Float, Int

from kaleido_jax import bundle as bundle_lib
from kaleido_jax import grammar, stages, tensor_files
from kaleido_jax.errors import UserError
from kaleido_jax.models.kaleido import Kaleido, KaleidoConfig
from kaleido_jax.settings import Settings
from kaleido_jax.written import allowed_tokens

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
ABOUT = "stablehlo.json"
Flat = dict[str, Array]


def save_stablehlo(
    folder: str | os.PathLike,
    bundle: bundle_lib.Bundle,
    dtype: str = "float32",
    platforms: Sequence[str] = ("cpu", "cuda"),
    settings: Mapping[str, Any] | None = None,
    tick: Callable[[int], None] = lambda size: None,
) -> pathlib.Path:
    """Writes an export folder with decode.stablehlo, render.stablehlo and stablehlo.json beside.

    decode(weights, captions [b, Lc] int32, seeds [b] uint32, indices [b] uint32, attempt uint32,
      temperature float32, top_k int32, top_p float32) -> (latents [b, Lz] int32, log p(z | c) [b])
    render(weights, captions, latents, seeds, indices, guidance_weight float32)
      -> pictures [b, H, W, C] float32 in model space; without latents it takes none.

    Args:
      folder: a new folder; it opens as any export does.
      dtype: of the weights, of bundle.DTYPES.
      platforms: what the programs are lowered for, of PLATFORMS.
      settings: fields of `Settings`, fixed in the programs; the config's by default. Guidance
        weight and the decoder's filters stay arguments.

    Raises:
      UserError: an unknown platform or setting; the folder exists.
    """
    unknown = [name for name in platforms if name not in PLATFORMS]
    if unknown or not platforms:
        raise UserError(f"platforms are {list(platforms)}; they must be of {', '.join(PLATFORMS)}")
    chosen = Settings.of_config(bundle.config).replace(settings or {})
    programs = _Programs(bundle, chosen)
    flat = traverse.flatten_dict(dict(bundle.params), sep="/")
    kind = tensor_files.DTYPES["BF16"] if dtype == "bfloat16" else np.dtype(dtype)
    weights = {
        name: jax.ShapeDtypeStruct(
            leaf.shape, kind if tensor_files.is_floating(np.dtype(leaf.dtype)) else leaf.dtype
        )
        for name, leaf in flat.items()
    }
    extra = {
        f"{name}.stablehlo": _lower(function, weights, arguments, platforms)
        for name, (function, arguments) in programs.all().items()
    }
    about = programs.about() | {"platforms": list(platforms), "programs": [*programs.all()]}
    extra[ABOUT] = (json.dumps(about, indent=2) + "\n").encode()
    made_from, vocabulary = bundle.fingerprint, bundle.vocabulary
    return bundle_lib.write_export(
        folder, bundle.config, vocabulary, flat, dtype, made_from, tick, extra
    )


def _lower(
    function: Callable[..., Any],
    weights: dict[str, jax.ShapeDtypeStruct],
    arguments: Sequence[tuple[str | None, Any]],
    platforms: Sequence[str],
) -> bytes:
    scope = jax_export.SymbolicScope()
    specs = [
        jax.ShapeDtypeStruct(
            () if shape is None else jax_export.symbolic_shape(shape, scope=scope), dtype
        )
        for shape, dtype in arguments
    ]
    exported = jax_export.export(jax.jit(function), platforms=tuple(platforms))(weights, *specs)
    return bytes(exported.serialize())


@dataclasses.dataclass(frozen=True)
class _Programs:
    """The functions that are exported, for one model and one way of sampling."""

    bundle: bundle_lib.Bundle
    settings: Settings

    @property
    def config(self) -> Any:
        return self.bundle.config

    @property
    def model(self) -> Kaleido:
        return Kaleido(KaleidoConfig.from_config(self.config).portable())

    @property
    def latent_length(self) -> int:
        return self.config.data.latent_length if self.config.latents else 0

    def all(self) -> dict[str, tuple[Callable[..., Any], list[tuple[str | None, Any]]]]:
        """Name -> (function of the weights and these arguments, (symbolic shape, type) of each)."""
        captions = (f"b, {self.config.data.caption_length}", jnp.int32)
        sample = [("b", jnp.uint32), ("b", jnp.uint32)]
        weight = (None, jnp.float32)
        if not self.latent_length:
            render = lambda weights, *rest: self.render(weights, rest[0], None, *rest[1:])  # noqa: E731
            return {"render": (render, [captions, *sample, weight])}
        filters = [(None, jnp.uint32), weight, (None, jnp.int32), weight]
        latents = (f"b, {self.latent_length}", jnp.int32)
        return {
            "decode": (self.decode, [captions, *sample, *filters]),
            "render": (self.render, [captions, latents, *sample, weight]),
        }

    def decode(
        self,
        weights: Flat,
        captions: Int[Array, "b lc"],
        seeds: Int[Array, "b"],
        indices: Int[Array, "b"],
        attempt: Int[Array, ""],
        temperature: Float[Array, ""],
        top_k: Int[Array, ""],
        top_p: Float[Array, ""],
    ) -> tuple[Int[Array, "b lz"], Float[Array, "b"]]:
        model, params = self.model, traverse.unflatten_dict(weights, sep="/")
        size = model.cfg.latent_decoder.vocab_size
        allowed = allowed_tokens(self.bundle.vocabulary, tuple(self.config.latents), size)
        constraint = None
        if self.settings.constrained:
            tables = grammar.compile_tables(
                self.bundle.vocabulary, tuple(self.config.latents), size
            )
            constraint = jax.tree.map(jnp.asarray, tables)
        encoded = stages.encode(model, params, captions)
        return stages.draw_latents(
            model,
            params,
            self.latent_length,
            encoded,
            seeds,
            indices,
            attempt,
            temperature,
            top_k,
            top_p,
            jnp.asarray(allowed),
            constraint,
        )

    def render(
        self,
        weights: Flat,
        captions: Int[Array, "b lc"],
        latents: Int[Array, "b lz"] | None,
        seeds: Int[Array, "b"],
        indices: Int[Array, "b"],
        guidance_weight: Float[Array, ""],
    ) -> Float[Array, "b h w c"]:
        model, params = self.model, traverse.unflatten_dict(weights, sep="/")
        length = self.config.data.caption_length
        length += self.latent_length + 1 if self.latent_length else 0
        # Any weight but 1: the program computes both branches, whatever weight it is given.
        plan = self.settings.replace({"guidance_weight": 2.0}).plan()
        pyramid = stages.render(
            model,
            params,
            stages.process_of(self.config, model.cfg.ratios),
            plan,
            stages.encode(model, params, captions),
            latents,
            stages.null_condition(model, params, length),
            seeds,
            indices,
            self.settings.dials()._replace(guidance_weight=guidance_weight),
        )
        return pyramid[0]

    def about(self) -> dict[str, Any]:
        """What a caller without this package must know."""
        data = self.config.data
        return {
            "version": 1,
            "caption_length": data.caption_length,
            "latent_length": self.latent_length,
            "pixel_centre": data.pixel_centre,
            "pixel_scale": data.pixel_scale,
            **dataclasses.asdict(self.settings),
        }
