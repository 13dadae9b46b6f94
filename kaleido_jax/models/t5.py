"""T5 1.0 and 1.1 encoder and decoder, the way Kaleido uses them.

`TextEncoder` reads the caption c, `LatentDecoder` models the latent tokens z given its states (the
paper's Section 3.2), `T5` is both with one shared token embedding, as published checkpoints have
it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from kaleido_jax import quantize
from kaleido_jax.models.t5_layers import (
    DecoderLayer,
    EncoderLayer,
    RelativePositionBias,
    T5Config,
    dropout,
    relative_position_bucket,
    rms_norm,
)

__all__ = [
    "T5",
    "LatentDecoder",
    "T5Config",
    "TextEncoder",
    "relative_position_bucket",
    "stack_layers",
    "unstack_layers",
]

# Where nn.scan stacks the layers of each parameter, as t5x's scalable_t5 does.
SCAN_AXIS = 1


def _run_stack(
    layer: type[nn.Module],
    fields: dict[str, Any],
    count: int,
    x: Array,
    *args,
    rounded: bool = False,
) -> Array:
    """Apply `count` layers, as `layers_0..` or, with scan_layers, as one scanned `layers`.

    `rounded` layers have 8-bit kernels, which become arrays one layer at a time.
    """
    cfg: T5Config = fields["cfg"]
    if rounded:
        dtype = jnp.dtype(cfg.dtype)
        layer = nn.map_variables(layer, "params", lambda tree: _restored(tree, dtype))
    if cfg.remat_policy != "none":
        minimal = jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims
        # A scan's body is not merged with its backward pass, so it needs no barrier against CSE.
        layer = nn.remat(
            layer,
            prevent_cse=not cfg.scan_layers,
            policy=minimal if cfg.remat_policy == "minimal" else None,
        )
    if cfg.scan_layers and count:
        stack = nn.scan(
            layer,
            variable_axes={"params": SCAN_AXIS, "cache": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=count,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return stack(**fields, name="layers")(x, *args)[0]
    for i in range(count):
        x, _ = layer(**fields, name=f"layers_{i}")(x, *args)
    return x


def _restored(collections: Mapping[str, Any], dtype: Any) -> dict[str, Any]:
    return {name: quantize.restore(tree, dtype) for name, tree in collections.items()}


class Encoder(nn.Module):
    """Bidirectional stack over embedded tokens."""

    cfg: T5Config

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length embed"],
        mask: Bool[Array, "batch length"],
        train: bool = False,
    ) -> Float[Array, "batch length embed"]:
        cfg = self.cfg
        positions = np.arange(x.shape[1])
        buckets = relative_position_bucket(
            positions[None, :] - positions[:, None],
            bidirectional=True,
            num_buckets=cfg.relpos_buckets,
            max_distance=cfg.relpos_max_distance,
        )
        bias = RelativePositionBias(cfg, name="relpos_bias")(buckets)
        x = dropout(cfg, train)(x)
        x = nn.with_logical_constraint(x, ("batch", "length", "embed"))
        fields = {"cfg": cfg, "train": train}
        x = _run_stack(
            EncoderLayer,
            fields,
            cfg.num_encoder_layers,
            x,
            mask[:, None, None, :],
            bias,
            rounded=quantize.is_rounded(self.variables.get("params", {})),
        )
        x = rms_norm(cfg, "encoder_norm")(x)
        return nn.with_logical_constraint(dropout(cfg, train)(x), ("batch", "length", "embed"))


class Decoder(nn.Module):
    """Causal stack over embedded tokens that attends to the encoder's states."""

    cfg: T5Config

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length embed"],
        enc_states: Float[Array, "batch keys embed"],
        enc_mask: Bool[Array, "batch keys"],
        input_mask: Bool[Array, "batch length"] | None = None,
        decode: bool = False,
        train: bool = False,
    ) -> tuple[Float[Array, "batch length embed"], Float[Array, "batch length vocab"] | None]:
        """(states after the final norm, logits or None where the head is the token embedding)."""
        cfg = self.cfg
        if decode and input_mask is not None:
            raise ValueError("input_mask belongs to the teacher-forced path; decode=True has none")
        length = x.shape[1]
        ready = decode and self.has_variable("cache", "cache_index")
        if ready:
            by_distance = self.get_variable("cache", "cached_bias")
        else:
            buckets = relative_position_bucket(
                -np.arange(length),
                bidirectional=False,
                num_buckets=cfg.relpos_buckets,
                max_distance=cfg.relpos_max_distance,
            )
            by_distance = RelativePositionBias(cfg, name="relpos_bias")(buckets)
        index = jnp.zeros((), jnp.int32)
        if decode:
            # A step needs the bias of each distance only, so it costs O(length).
            self.variable("cache", "cached_bias", lambda: by_distance)
            position = self.variable("cache", "cache_index", lambda: index)
            if ready:
                index = position.value
                position.value = index + length

        keys = jnp.arange(by_distance.shape[1])
        distance = (index + jnp.arange(length))[:, None] - keys[None, :]
        bias = jnp.take(by_distance, jnp.maximum(distance, 0), axis=1)
        mask = (distance >= 0)[None, None]
        if input_mask is not None:
            mask = mask & input_mask[:, None, None, :]

        x = dropout(cfg, train)(x)
        x = nn.with_logical_constraint(x, ("batch", "length", "embed"))
        enc_states = enc_states.astype(jnp.dtype(cfg.dtype))
        fields = {"cfg": cfg, "train": train, "decode": decode}
        args = (enc_states, mask, enc_mask[:, None, None, :], bias, index)
        x = _run_stack(DecoderLayer, fields, cfg.num_decoder_layers, x, *args)
        x = dropout(cfg, train)(rms_norm(cfg, "decoder_norm")(x))
        x = nn.with_logical_constraint(x, ("batch", "length", "embed"))
        if cfg.logits_via_embedding:
            return x, None
        head = nn.Dense(
            cfg.vocab_size,
            use_bias=False,
            kernel_init=nn.with_logical_partitioning(
                nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal"),
                ("embed", "vocab"),
            ),
            dtype=jnp.float32,
            param_dtype=jnp.dtype(cfg.param_dtype),
            name="logits_dense",
        )
        return x, nn.with_logical_constraint(head(x), ("batch", "length", "vocab"))


def _embedding_init(
    numbers: tuple[int, ...], key: Key[Array, ""], shape: tuple[int, int], dtype: Any
) -> Float[Array, "vocab embed"]:
    """Standard normal, as T5's; rows of numbers are sinusoids of the same mean square."""
    table = nn.initializers.normal(1.0)(key, shape, dtype)
    if not numbers:
        return table
    first, count = numbers
    half = shape[1] // 2
    # From half a wave over all numbers to a wave of a quarter of them.
    waves = np.pi * 8.0 ** (np.arange(half) / max(half - 1, 1))
    angle = np.arange(count)[:, None] / count * waves
    rows = np.sqrt(2) * np.concatenate([np.sin(angle), np.cos(angle)], axis=1)
    return table.at[first : first + count].set(rows.astype(dtype))


def _token_embedder(cfg: T5Config) -> nn.Embed:
    return nn.Embed(
        cfg.vocab_size,
        cfg.emb_dim,
        embedding_init=nn.with_logical_partitioning(
            functools.partial(_embedding_init, cfg.number_tokens), ("vocab", "embed")
        ),
        dtype=jnp.dtype(cfg.dtype),
        param_dtype=jnp.dtype(cfg.param_dtype),
    )


def _decode(embedder: nn.Embed, decoder: Decoder, tokens, *args, **kwargs):
    """Embeds and decodes; T5 1.0's logits come from the embedding, scaled by d**-0.5."""
    hidden, logits = decoder(embedder(tokens), *args, **kwargs)
    if logits is None:
        table = embedder.embedding.astype(jnp.float32)
        logits = (hidden.astype(jnp.float32) * hidden.shape[-1] ** -0.5) @ table.T
        logits = nn.with_logical_constraint(logits, ("batch", "length", "vocab"))
    return hidden, logits


class TextEncoder(nn.Module):
    """Caption tokens to states; parameters `token_embedder` and `encoder`."""

    cfg: T5Config

    def setup(self):
        self.token_embedder = _token_embedder(self.cfg)
        self.encoder = Encoder(self.cfg)

    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        mask: Bool[Array, "batch length"] | None = None,
        train: bool = False,
    ) -> Float[Array, "batch length embed"]:
        """States after the final norm; keys outside `mask` (default: tokens != 0) are not read."""
        mask = tokens != 0 if mask is None else mask
        return self.encoder(self.token_embedder(tokens), mask, train)


class LatentDecoder(nn.Module):
    """Latent tokens given encoder states; parameters `token_embedder` and `decoder`."""

    cfg: T5Config

    def setup(self):
        self.token_embedder = _token_embedder(self.cfg)
        self.decoder = Decoder(self.cfg)

    def __call__(
        self,
        input_tokens: Int[Array, "batch length"],
        enc_states: Float[Array, "batch keys embed"],
        enc_mask: Bool[Array, "batch keys"],
        input_mask: Bool[Array, "batch length"] | None = None,
        decode: bool = False,
        train: bool = False,
    ) -> tuple[Float[Array, "batch length embed"], Float[Array, "batch length vocab"]]:
        """(hidden, logits): states after the final norm, before T5 1.0's scaling; float32 logits.

        Teacher-forced (`decode=False`): causal; keys where `input_mask` is False are not read. The
        start token is 0, so the mask cannot be read off the tokens and defaults to all true.

        Cached (`decode=True`, with mutable=["cache"]): the first call, without a cache, takes any
        [batch, max_length] tokens and returns a cache of that length with the encoder's keys and
        values in it (its outputs mean nothing). Each further call takes the next token (or tokens)
        of each sequence; past `max_length` the last place is overwritten, so the caller must stop
        there. `enc_states` is then no longer read, `enc_mask` is.
        """
        return _decode(
            self.token_embedder,
            self.decoder,
            input_tokens,
            enc_states,
            enc_mask,
            input_mask,
            decode=decode,
            train=train,
        )


class T5(nn.Module):
    """The whole model with one shared embedding: `token_embedder`, `encoder`, `decoder`."""

    cfg: T5Config

    def setup(self):
        self.token_embedder = _token_embedder(self.cfg)
        self.encoder = Encoder(self.cfg)
        self.decoder = Decoder(self.cfg)

    def encode(
        self,
        tokens: Int[Array, "batch length"],
        mask: Bool[Array, "batch length"] | None = None,
        train: bool = False,
    ) -> Float[Array, "batch length embed"]:
        """As TextEncoder."""
        mask = tokens != 0 if mask is None else mask
        return self.encoder(self.token_embedder(tokens), mask, train)

    def decode(
        self,
        input_tokens: Int[Array, "batch length"],
        enc_states: Float[Array, "batch keys embed"],
        enc_mask: Bool[Array, "batch keys"],
        input_mask: Bool[Array, "batch length"] | None = None,
        decode: bool = False,
        train: bool = False,
    ) -> tuple[Float[Array, "batch length embed"], Float[Array, "batch length vocab"]]:
        """As LatentDecoder."""
        return _decode(
            self.token_embedder,
            self.decoder,
            input_tokens,
            enc_states,
            enc_mask,
            input_mask,
            decode=decode,
            train=train,
        )

    def __call__(
        self,
        encoder_tokens: Int[Array, "batch keys"],
        decoder_tokens: Int[Array, "batch length"],
        encoder_mask: Bool[Array, "batch keys"] | None = None,
        input_mask: Bool[Array, "batch length"] | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, "batch length embed"], Float[Array, "batch length vocab"]]:
        """(decoder states, logits) of the teacher-forced model."""
        mask = encoder_tokens != 0 if encoder_mask is None else encoder_mask
        states = self.encode(encoder_tokens, mask, train)
        return self.decode(decoder_tokens, states, mask, input_mask, train=train)


def _layer_count(stack: Mapping[str, Any]) -> int:
    return sum(name.startswith("layers_") for name in stack)


def stack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """Unscanned T5 parameters to scanned ones: `layers_0..n` become `layers`, stacked on axis 1.

    Takes the tree of T5, TextEncoder or LatentDecoder, without partitioning boxes; other entries
    are kept.
    """
    out = dict(params)
    for name in ("encoder", "decoder"):
        if name in params and (count := _layer_count(params[name])):
            layers = [params[name][f"layers_{i}"] for i in range(count)]
            rest = {k: v for k, v in params[name].items() if not k.startswith("layers_")}
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves, SCAN_AXIS), *layers)
            out[name] = {**rest, "layers": stacked}
    return out


def unstack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `stack_layers`."""
    out = dict(params)
    for name in ("encoder", "decoder"):
        if name in params and "layers" in params[name]:
            stacked = params[name]["layers"]
            count = jax.tree.leaves(stacked)[0].shape[SCAN_AXIS]
            out[name] = {k: v for k, v in params[name].items() if k != "layers"}
            for i in range(count):
                out[name][f"layers_{i}"] = jax.tree.map(
                    lambda leaf, i=i: jnp.take(leaf, i, axis=SCAN_AXIS), stacked
                )
    return out
