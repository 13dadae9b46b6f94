"""The parts of T5: configuration, relative position buckets, attention, MLP, layers.

Raffel et al. 2020 (T5 1.0) and Shazeer 2020, "GLU variants" (T5 1.1). Parameters bear t5x's names
and two-dimensional shapes, so an unscanned t5x checkpoint loads by identity.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kaleido_jax import lora
from kaleido_jax.errors import UserError

ACTIVATIONS = {
    # t5x and Hugging Face's "gated-gelu" both mean the tanh approximation.
    "gelu": lambda x: nn.gelu(x, approximate=True),
    "relu": nn.relu,
    "silu": nn.silu,
    "linear": lambda x: x,
}
REMAT_POLICIES = ("none", "minimal", "full")

# Finite, so that a row without any allowed key gives a uniform average and not NaN.
MASKED = -1e10

_fan_in = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes and switches of a T5 model; the field names are t5x's.

    `mlp_activations` is ("gelu", "linear") for T5 1.1 and ("relu",) for T5 1.0, whose head is the
    token embedding itself (`logits_via_embedding`). `dtype` is what the layers compute in,
    `param_dtype` what parameters are stored in; attention's softmax, the norms' statistics and the
    logits are float32 always. `remat_policy`: "none" keeps every activation, "minimal" keeps matrix
    products without batch dimensions, "full" recomputes each layer in the backward pass. With a
    `lora_rank` the kernels of the layers that `lora_kernels` names ("query", "wi_0") get adapters
    (`kaleido_jax.lora`). `number_tokens` is (first id, count) of pieces that are the whole numbers
    0..count-1; their embeddings start as sinusoids of the number instead of at random, so that a
    model trained from scratch need not learn one by one what lies near what. () as in T5.

    Raises UserError for values that no T5 has.
    """

    vocab_size: int = 32128
    emb_dim: int = 512
    num_heads: int = 8
    head_dim: int = 64
    mlp_dim: int = 2048
    num_encoder_layers: int = 6
    num_decoder_layers: int = 6
    mlp_activations: tuple[str, ...] = ("gelu", "linear")
    logits_via_embedding: bool = False
    relpos_buckets: int = 32
    relpos_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    dropout_rate: float = 0.0
    dtype: str = "float32"
    param_dtype: str = "float32"
    scan_layers: bool = False
    remat_policy: str = "none"
    lora_rank: int = 0
    lora_alpha: float = 16.0
    lora_kernels: tuple[str, ...] = ()
    number_tokens: tuple[int, ...] = ()

    def __post_init__(self):
        for name in ("mlp_activations", "lora_kernels", "number_tokens"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("vocab_size", "emb_dim", "num_heads", "head_dim", "mlp_dim"):
            if getattr(self, name) < 1:
                raise UserError(f"T5 config: {name} must be at least 1, got {getattr(self, name)}")
        for name in ("num_encoder_layers", "num_decoder_layers"):
            if getattr(self, name) < 0:
                raise UserError(
                    f"T5 config: {name} must not be negative, got {getattr(self, name)}"
                )
        unknown = [a for a in self.mlp_activations if a not in ACTIVATIONS]
        if unknown or not self.mlp_activations:
            raise UserError(
                f"T5 config: mlp_activations {list(self.mlp_activations)} must be of "
                f"{sorted(ACTIVATIONS)}"
            )
        self._check_lora()
        self._check_numbers()
        if self.remat_policy not in REMAT_POLICIES:
            raise UserError(
                f"T5 config: remat_policy {self.remat_policy!r} must be one of "
                f"{list(REMAT_POLICIES)}"
            )
        if self.relpos_buckets < 4 or self.relpos_buckets % 2:
            raise UserError(
                f"T5 config: relpos_buckets must be even and at least 4, got {self.relpos_buckets}"
            )
        if self.relpos_max_distance <= self.relpos_buckets // 2:
            raise UserError(
                "T5 config: relpos_max_distance must exceed half of relpos_buckets, "
                f"got {self.relpos_max_distance} and {self.relpos_buckets}"
            )
        if not 0.0 <= self.dropout_rate < 1.0:
            raise UserError(f"T5 config: dropout_rate must be in [0, 1), got {self.dropout_rate}")

    def _check_lora(self) -> None:
        known = ("query", "key", "value", "out", *self.mlp_kernels, "wo")
        wrong = [name for name in self.lora_kernels if name not in known]
        if wrong or (self.lora_rank and not self.lora_kernels):
            raise UserError(
                f"config key 'model.lora_kernels' is {self.lora_kernels}; it needs some of "
                f"{', '.join(known)}"
            )

    def _check_numbers(self) -> None:
        if self.number_tokens:
            first, count = (*self.number_tokens, 0)[:2]
            fits = first >= 0 < count and first + count <= self.vocab_size
            if len(self.number_tokens) != 2 or not fits or self.emb_dim % 2:
                raise UserError(
                    f"T5 config: number_tokens is {self.number_tokens}; it must be () or (first "
                    f"id, count) within the vocabulary of {self.vocab_size}, and emb_dim even"
                )

    @property
    def mlp_kernels(self) -> tuple[str, ...]:
        """Names of the input kernels of the MLP, one per activation."""
        count = len(self.mlp_activations)
        return ("wi",) if count == 1 else tuple(f"wi_{i}" for i in range(count))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> T5Config:
        """From a plain mapping; raises UserError for an unknown key, naming the nearest."""
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise UserError(f"T5 config: unknown key {key!r}{hint}")
        return cls(**values)


def relative_position_bucket(
    relative_position: np.ndarray, bidirectional: bool, num_buckets: int, max_distance: int
) -> np.ndarray:
    """Bucket of each key position - query position (T5, Section 2.1): int32 in [0, num_buckets).

    Half of a direction's buckets are exact distances, the rest are spaced logarithmically up to
    `max_distance`. Positions are static, so this runs on the host in float64.
    """
    distance = -np.asarray(relative_position, np.int64)
    offset = 0
    if bidirectional:
        num_buckets //= 2
        offset = np.where(distance < 0, num_buckets, 0)
        distance = np.abs(distance)
    else:
        distance = np.maximum(distance, 0)
    exact = num_buckets // 2
    octaves = np.log(np.maximum(distance, 1) / exact) / math.log(max_distance / exact)
    # The small addend keeps exact powers on the upper side of their boundary.
    spaced = exact + np.floor(octaves * (num_buckets - exact) + 1e-9).astype(np.int64)
    bucket = np.where(distance < exact, distance, np.minimum(spaced, num_buckets - 1))
    return (offset + bucket).astype(np.int32)


class RelativePositionBias(nn.Module):
    """Learned bias per head and bucket; one table serves all layers of a stack."""

    cfg: T5Config

    @nn.compact
    def __call__(self, buckets: Int[np.ndarray, "*shape"]) -> Float[Array, "heads ..."]:
        """Bias [heads, *buckets.shape] in float32, as it is added to float32 logits."""
        init = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
        table = self.param(
            "rel_embedding",
            nn.with_logical_partitioning(init, ("heads", "relpos_buckets")),
            (self.cfg.num_heads, self.cfg.relpos_buckets),
            jnp.dtype(self.cfg.param_dtype),
        )
        return jnp.take(table.astype(jnp.float32), buckets, axis=1)


class AdaptedDense(nn.Module):
    """A linear layer without bias whose kernel has a low-rank adapter, x W + alpha / r (x A) B."""

    cfg: T5Config
    features: int
    axes: tuple[str, str]
    init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        cfg, (rows, columns) = self.cfg, self.axes

        def param(name, init, axes, shape):
            init = nn.with_logical_partitioning(init, axes)
            return self.param(name, init, shape, jnp.dtype(cfg.param_dtype))

        width, rank = x.shape[-1], cfg.lora_rank
        kernel = param("kernel", self.init, self.axes, (width, self.features))
        a = param(lora.A, nn.initializers.he_uniform(), (rows, None), (width, rank))
        b = param(lora.B, nn.initializers.zeros_init(), (None, columns), (rank, self.features))
        x, kernel, a, b = (value.astype(jnp.dtype(cfg.dtype)) for value in (x, kernel, a, b))
        return x @ kernel + (x @ a @ b) * (cfg.lora_alpha / rank)


def _dense(
    cfg: T5Config, features: int, axes: tuple[str, str], name: str, init=_fan_in
) -> nn.Dense | AdaptedDense:
    if cfg.lora_rank and name in cfg.lora_kernels:
        return AdaptedDense(cfg, features, axes, init, name=name)
    return nn.Dense(
        features,
        use_bias=False,
        kernel_init=nn.with_logical_partitioning(init, axes),
        dtype=jnp.dtype(cfg.dtype),
        param_dtype=jnp.dtype(cfg.param_dtype),
        name=name,
    )


def rms_norm(cfg: T5Config, name: str) -> nn.RMSNorm:
    """T5's layer norm: no mean, no bias, statistics in float32."""
    return nn.RMSNorm(
        epsilon=cfg.layer_norm_epsilon,
        scale_init=nn.with_logical_partitioning(nn.initializers.ones, ("embed",)),
        dtype=jnp.dtype(cfg.dtype),
        param_dtype=jnp.dtype(cfg.param_dtype),
        name=name,
    )


def dropout(cfg: T5Config, train: bool) -> nn.Dropout:
    """Dropout of whole channels along the length, as t5x."""
    return nn.Dropout(cfg.dropout_rate, broadcast_dims=(-2,), deterministic=not train)


class Attention(nn.Module):
    """Multi-head attention, unscaled: 1/sqrt(head_dim) sits in the query's initialiser.

    `cache` is "" (none), "self" (keys and values of past tokens) or "cross" (the encoder's keys and
    values, computed once). A call that finds no cache creates it: with "self" as zeros of the
    length it was given, with "cross" from `memory`, and otherwise attends as without one.
    """

    cfg: T5Config
    train: bool = False
    cache: str = ""

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length embed"],
        memory: Float[Array, "batch keys embed"],
        mask: Bool[Array, "#batch 1 #length all_keys"],
        bias: Float[Array, "heads length all_keys"] | None = None,
        index: Int[Array, ""] | None = None,
    ) -> Float[Array, "batch length embed"]:
        """`index` is the place of the first token of `x` in the self cache."""
        cfg = self.cfg
        width = cfg.num_heads * cfg.head_dim

        def heads(name: str, inputs, init=_fan_in):
            out = _dense(cfg, width, ("embed", "joined_kv"), name, init)(inputs)
            out = out.reshape(*out.shape[:-1], cfg.num_heads, cfg.head_dim)
            return nn.with_logical_constraint(out, ("batch", "length", "heads", "kv"))

        def query_init(*args):
            return _fan_in(*args) / math.sqrt(cfg.head_dim)

        query = heads("query", x, query_init)
        ready = bool(self.cache) and self.has_variable("cache", "cached_key")
        if self.cache == "cross" and ready:
            key = self.get_variable("cache", "cached_key")
            value = self.get_variable("cache", "cached_value")
        else:
            key, value = heads("key", memory), heads("value", memory)
        if self.cache:
            start = jnp.zeros_like if self.cache == "self" else (lambda new: new)
            cached_key = self.variable("cache", "cached_key", start, key)
            cached_value = self.variable("cache", "cached_value", start, value)
            if self.cache == "self" and ready:
                key = jax.lax.dynamic_update_slice_in_dim(cached_key.value, key, index, axis=1)
                value = jax.lax.dynamic_update_slice_in_dim(
                    cached_value.value, value, index, axis=1
                )
                cached_key.value, cached_value.value = key, value

        logits = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
        if bias is not None:
            logits = logits + bias[None]
        logits = jnp.where(mask, logits, MASKED)
        weights = jax.nn.softmax(logits, axis=-1).astype(query.dtype)
        weights = dropout(cfg, self.train)(weights)
        out = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
        out = nn.with_logical_constraint(out, ("batch", "length", "heads", "kv"))
        return _dense(cfg, cfg.emb_dim, ("joined_kv", "embed"), "out")(
            out.reshape(*out.shape[:2], width)
        )


class Mlp(nn.Module):
    """Feed-forward block: one activation per input kernel, multiplied (`wi`; `wi_0`, `wi_1`)."""

    cfg: T5Config
    train: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "batch length embed"]) -> Float[Array, "batch length embed"]:
        cfg = self.cfg
        hidden = None
        for name, activation in zip(cfg.mlp_kernels, cfg.mlp_activations, strict=True):
            y = ACTIVATIONS[activation](_dense(cfg, cfg.mlp_dim, ("embed", "mlp"), name)(x))
            hidden = y if hidden is None else hidden * y
        hidden = dropout(cfg, self.train)(hidden)
        hidden = nn.with_logical_constraint(hidden, ("batch", "length", "mlp"))
        return _dense(cfg, cfg.emb_dim, ("mlp", "embed"), "wo")(hidden)


def _residual(cfg: T5Config, train: bool, x: Array, y: Array) -> Array:
    return nn.with_logical_constraint(x + dropout(cfg, train)(y), ("batch", "length", "embed"))


class EncoderLayer(nn.Module):
    """Self-attention, then MLP, each on the normed input. Returns (x, None) for nn.scan."""

    cfg: T5Config
    train: bool = False

    @nn.compact
    def __call__(self, x, mask, bias):
        cfg, train = self.cfg, self.train
        y = rms_norm(cfg, "pre_attention_layer_norm")(x)
        y = Attention(cfg, train, name="attention")(y, y, mask, bias)
        x = _residual(cfg, train, x, y)
        y = Mlp(cfg, train, name="mlp")(rms_norm(cfg, "pre_mlp_layer_norm")(x))
        return _residual(cfg, train, x, y), None


class DecoderLayer(nn.Module):
    """Causal self-attention, attention to the encoder, MLP. Returns (x, None) for nn.scan."""

    cfg: T5Config
    train: bool = False
    decode: bool = False

    @nn.compact
    def __call__(self, x, memory, mask, memory_mask, bias, index):
        cfg, train = self.cfg, self.train
        self_cache, cross_cache = ("self", "cross") if self.decode else ("", "")
        y = rms_norm(cfg, "pre_self_attention_layer_norm")(x)
        y = Attention(cfg, train, self_cache, name="self_attention")(y, y, mask, bias, index)
        x = _residual(cfg, train, x, y)
        y = rms_norm(cfg, "pre_cross_attention_layer_norm")(x)
        y = Attention(cfg, train, cross_cache, name="encoder_decoder_attention")(
            y, memory, memory_mask
        )
        x = _residual(cfg, train, x, y)
        y = Mlp(cfg, train, name="mlp")(rms_norm(cfg, "pre_mlp_layer_norm")(x))
        return _residual(cfg, train, x, y), None
