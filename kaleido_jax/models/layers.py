"""Building blocks of the denoisers: residual, attention and embedding layers, NHWC.

The order of operations is ml-mdm's (MDM, Gu et al. 2023), held to it by tests/parity_mdm.py.
Statistics of every normalisation and the softmax are float32 whatever the compute dtype.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
from collections.abc import Mapping
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from kaleido_jax.errors import UserError

NORM_EPSILON = 1e-5  # PyTorch's default, which the released weights were trained with
REMAT_POLICIES = ("none", "minimal", "full")
ATTENTIONS = ("auto", "xla", "cudnn")

T = TypeVar("T")
Features = Float[Array, "b h w c"]
Tokens = Float[Array, "b l d"]
Mask = Bool[Array, "b l"]
Vector = Float[Array, "b d"]


def from_mapping(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Builds the dataclass `cls` from a mapping; lists become tuples.

    Raises:
      UserError: a key that is no field of `cls`, naming the nearest; `where` names the mapping.
    """
    names = [field.name for field in dataclasses.fields(cls)]
    for key in values:
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1, cutoff=0.0)
            raise UserError(f"unknown key {key!r} in {where}; the nearest is {near[0]!r}")
    lists = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return cls(**lists)


def checkpointed(module: type[nn.Module], policy: str, static_argnums: tuple = ()) -> Any:
    """Wraps a module class so that its activations are recomputed in the backward pass.

    Args:
      module: the class; arguments of its __call__ are counted with `self` as 0.
      policy: 'none' keeps everything, 'minimal' keeps the results of matrix products without a
        batch dimension, 'full' keeps nothing.
      static_argnums: positions of Python arguments that are not arrays.
    """
    if policy == "none":
        return module
    saved = jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims
    return nn.remat(
        module,
        static_argnums=static_argnums,
        policy=saved if policy == "minimal" else None,
    )


def fan_in_uniform() -> nn.initializers.Initializer:
    """Uniform with variance 1 / (3 fan_in), with which ml-mdm starts every layer."""
    return nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def logical(init: nn.initializers.Initializer, *axes: str | None) -> Any:
    """An initialiser whose parameter carries logical axis names."""
    return nn.with_logical_partitioning(init, axes)


def dense(
    features: int,
    axes: tuple[str | None, str | None],
    dtypes: Mapping[str, Any],
    *,
    zero: bool = False,
    use_bias: bool = True,
    name: str | None = None,
) -> nn.Dense:
    """A linear layer over the last axis, zero-initialised where `zero`."""
    init = nn.initializers.zeros_init() if zero else fan_in_uniform()
    return nn.Dense(
        features,
        use_bias=use_bias,
        kernel_init=logical(init, *axes),
        bias_init=logical(nn.initializers.zeros_init(), axes[1]),
        name=name,
        **dtypes,
    )


def conv(
    features: int,
    dtypes: Mapping[str, Any],
    *,
    stride: int = 1,
    zero: bool = False,
    axes: tuple[str | None, str | None] = ("conv_in", "conv_out"),
    name: str | None = None,
) -> nn.Conv:
    """A 3x3 convolution with one pixel of padding on every side, zero-initialised where `zero`."""
    init = nn.initializers.zeros_init() if zero else fan_in_uniform()
    return nn.Conv(
        features,
        (3, 3),
        strides=stride,
        # 'SAME' would pad a strided convolution on one side only.
        padding=((1, 1), (1, 1)),
        kernel_init=logical(init, "height", "width", *axes),
        bias_init=logical(nn.initializers.zeros_init(), axes[1]),
        name=name,
        **dtypes,
    )


class UpConv(nn.Module):
    """Twice the side by nearest neighbour, then a 3x3 convolution with one pixel of padding.

    The picture of twice the side is never made. A pixel of it at an even row sees the rows
    i - 1, i, i of the small picture, one at an odd row i, i, i + 1; so with columns. Adding the
    kernel's entries that meet the same pixel gives a 2x2 kernel for each of the four kinds of
    pixel, which convolves the small picture: four ninths of the operations. Parameters are
    `nn.Conv`'s.
    """

    features: int
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Features) -> Features:
        b, height, width, channels = x.shape
        axes, shape = ("height", "width", "conv_in", "conv_out"), (3, 3, channels, self.features)
        zeros = logical(nn.initializers.zeros_init(), "conv_out")
        kernel = self.param("kernel", logical(fan_in_uniform(), *axes), shape, self.param_dtype)
        bias = self.param("bias", zeros, (self.features,), self.param_dtype)
        x, bias = x.astype(self.dtype), bias.astype(self.dtype)

        def halves(kernel: Array, axis: int) -> tuple[Array, Array]:
            before, middle, after = jnp.split(kernel, 3, axis)
            even = jnp.concatenate([before, middle + after], axis)
            return even, jnp.concatenate([before + middle, after], axis)

        rows = [
            [
                jax.lax.conv_general_dilated(
                    x,
                    part.astype(self.dtype),
                    window_strides=(1, 1),
                    padding=((1 - i, i), (1 - j, j)),
                    dimension_numbers=("NHWC", "HWIO", "NHWC"),
                )
                for j, part in enumerate(halves(half, 1))
            ]
            for i, half in enumerate(halves(kernel, 0))
        ]
        out = jnp.stack([jnp.stack(row, axis=3) for row in rows], axis=2)
        return out.reshape(b, 2 * height, 2 * width, self.features) + bias


def layer_norm(dtypes: Mapping[str, Any], name: str | None = None) -> nn.LayerNorm:
    """LayerNorm over the last axis."""
    return nn.LayerNorm(
        epsilon=NORM_EPSILON,
        use_fast_variance=False,
        scale_init=logical(nn.initializers.ones_init(), "embed"),
        bias_init=logical(nn.initializers.zeros_init(), "embed"),
        name=name,
        **dtypes,
    )


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The exact GELU, by the error function."""
    return jax.nn.gelu(x, approximate=False)


def attend(
    query: Tokens,
    key: Tokens,
    value: Tokens,
    heads: int,
    mask: Mask | None = None,
    implementation: str = "auto",
) -> Tokens:
    """Multi-head scaled dot-product attention on [B, length, heads * width].

    Where `mask` leaves a query no key at all the result is 0, not NaN.

    Args:
      implementation: 'xla'; 'cudnn', flash attention on NVIDIA GPUs; 'auto', the latter where
        it is to be had: on a GPU, in bfloat16 or float16, with heads that cuDNN takes.

    Raises:
      UserError: 'cudnn' where it is not to be had.
    """
    split = lambda x: x.reshape(*x.shape[:2], heads, -1)  # noqa: E731
    arrays = split(query), split(key), split(value)
    allowed = None if mask is None else mask[:, None, None, :]
    width = arrays[0].shape[-1]
    chosen = attention_implementation(implementation, query.dtype, width, jax.default_backend())
    if chosen == "cudnn" and mask is not None:
        arrays, allowed = even_lengths(arrays, allowed)
    out = jax.nn.dot_product_attention(*arrays, mask=allowed, implementation=chosen)
    out = out[:, : query.shape[1]].reshape(query.shape)
    if mask is None:
        return out
    return jnp.where(mask.any(axis=-1)[:, None, None], out, 0)


def attention_implementation(requested: str, dtype: Any, head_width: int, backend: str) -> str:
    """'xla' or 'cudnn' for `requested` of ATTENTIONS on a backend; raises as `attend` says."""
    # Wider heads run on the newest GPUs only.
    fits = jnp.dtype(dtype).itemsize == 2 and head_width <= 128 and head_width % 8 == 0
    available = fits and backend == "gpu"
    if requested == "cudnn" and not available:
        raise UserError(
            "attention 'cudnn' needs a GPU, bfloat16 and heads of 8, 16, .. or 128 channels; "
            f"here are {backend}, {jnp.dtype(dtype).name} and {head_width}; use 'auto'"
        )
    return "xla" if requested == "xla" or not available else "cudnn"


def even_lengths(
    arrays: tuple[Float[Array, "b l h d"], ...], allowed: Bool[Array, "b 1 1 k"]
) -> tuple[tuple[Float[Array, "b l h d"], ...], Bool[Array, "b 1 q k"]]:
    """(query, key, value) of even lengths, and the mask of all logits: cuDNN takes no others."""
    query, key, value = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in arrays)
    allowed = jnp.pad(allowed, ((0, 0),) * 3 + ((0, key.shape[1] - allowed.shape[-1]),))
    shape = (allowed.shape[0], 1, query.shape[1], key.shape[1])
    return (query, key, value), jnp.broadcast_to(allowed, shape)


def masked_mean(states: Tokens, mask: Mask) -> Vector:
    """Mean of the real positions in float32; 0 where there is none."""
    weight = mask.astype(jnp.float32)
    total = jnp.einsum("bld,bl->bd", states.astype(jnp.float32), weight)
    return total / jnp.maximum(weight.sum(axis=1, keepdims=True), 1)


def sinusoid(value: Float[Array, "b"], width: int) -> Vector:
    """[B, width] float32: sines then cosines of value * exp(-ln(10000) i / (width / 2))."""
    half = width // 2
    # Rounded to float32 after each step, as ml-mdm does: at an angle of 1000 the last bit of a
    # frequency moves the sine by 1e-4.
    exponent = np.arange(half, dtype=np.float32) * np.float32(-math.log(10000) / half)
    frequency = np.exp(exponent.astype(np.float64)).astype(np.float32)
    angle = value.astype(jnp.float32)[:, None] * frequency
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def space_to_depth(x: Features, patch: int) -> Features:
    """[B, H, W, C] to [B, H/p, W/p, p*p*C]: rows, columns, channels of a patch in this order."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // patch, patch, w // patch, patch, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h // patch, w // patch, -1)


def depth_to_space(x: Features, patch: int) -> Features:
    """The inverse of `space_to_depth`."""
    b, h, w, _ = x.shape
    x = x.reshape(b, h, w, patch, patch, -1).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, h * patch, w * patch, -1)


def with_positions(x: Features, features: int) -> Features:
    """Appends sines and cosines of the row, then of the column, `features` of each.

    Wavelengths are 2, 1, 1/2, .. of the side, so that any size of image gives the same place the
    same numbers.
    """
    if not features:
        return x
    b, height, width, _ = x.shape
    waves = jnp.pi * 2.0 ** jnp.arange(features // 2)

    def embed(side: int) -> Float[Array, "side features"]:
        angle = (jnp.arange(side)[:, None] + 0.5) / side * waves
        return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)

    shape = (b, height, width, features)
    rows = jnp.broadcast_to(embed(height)[None, :, None], shape)
    columns = jnp.broadcast_to(embed(width)[None, None, :], shape)
    return jnp.concatenate([x, rows.astype(x.dtype), columns.astype(x.dtype)], axis=-1)


def constrain(x: Features) -> Features:
    """Names the axes of image features for the mesh rules."""
    return nn.with_logical_constraint(x, ("batch", "height", "width", "conv_out"))


class GroupNorm(nn.Module):
    """Normalisation over space and the channels of a group; parameters `scale` and `bias`.

    Means over space come first and are then averaged over a group's channels: no array is split
    by groups, which costs flax's GroupNorm a tenth of a training step on a CPU. Two small products
    with the 0s and 1s of who is in which group average and spread. Reshaping and repeating would
    too, but XLA moves a repeat into the loops over pixels, which then take thrice as long on a CPU.
    The variance takes the mean off first: the mean square less the squared mean would lose the
    variance of the few numbers of a group at 1x1 or 2x2 pixels, which epsilon then magnifies.
    """

    groups: int
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Features) -> Features:
        width = x.shape[-1]
        init = nn.initializers
        scale = self.param(
            "scale", logical(init.ones_init(), "conv_out"), (width,), self.param_dtype
        )
        bias = self.param(
            "bias", logical(init.zeros_init(), "conv_out"), (width,), self.param_dtype
        )

        size = width // self.groups
        member = jnp.repeat(jnp.eye(self.groups), size, axis=1)
        # In float32 on every device, where products may be less by default.
        product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

        def mean(x: Features) -> Features:
            means = product(x.mean(axis=(1, 2)), member.T) / size
            return product(means, member)[:, None, None, :]

        def normalise(x: Features, scale: Array, bias: Array) -> Features:
            x = x.astype(jnp.float32)
            x = x - checkpoint_name(mean(x), "moments")
            variance = checkpoint_name(mean(jnp.square(x)), "moments")
            factor = jax.lax.rsqrt(variance + NORM_EPSILON) * scale
            return (x * factor + bias).astype(self.dtype)

        if x.dtype != jnp.float32:
            # The backward pass keeps x as it came, in half the bytes, and not its float32 copy.
            keep = jax.checkpoint_policies.save_only_these_names("moments")
            normalise = jax.checkpoint(normalise, policy=keep)
        return normalise(x, scale, bias)


class SinusoidMLP(nn.Module):
    """Embeds a number per example: sinusoid of a quarter of the width, linear, SiLU, linear."""

    width: int
    dtypes: Mapping[str, Any]
    zero: bool = False

    @nn.compact
    def __call__(self, value: Float[Array, "b"]) -> Vector:
        x = sinusoid(value, self.width // 4)
        x = nn.silu(dense(self.width, (None, "mlp"), self.dtypes, name="hidden")(x))
        return dense(self.width, ("mlp", "time_embed"), self.dtypes, zero=self.zero, name="out")(x)


class ResidualBlock(nn.Module):
    """GroupNorm, SiLU, conv; GroupNorm, scale and shift from the embedding, SiLU, zero conv."""

    channels: int
    groups: int
    dropout: float
    dtypes: Mapping[str, Any]

    @nn.compact
    def __call__(self, x: Features, emb: Vector, train: bool = False) -> Features:
        h = nn.silu(GroupNorm(self.groups, **self.dtypes, name="norm_in")(x))
        h = constrain(conv(self.channels, self.dtypes, name="conv_in")(h))
        film = dense(2 * self.channels, ("time_embed", "conv_out"), self.dtypes, name="film")
        scale, shift = jnp.split(film(nn.silu(emb))[:, None, None, :], 2, axis=-1)
        h = GroupNorm(self.groups, **self.dtypes, name="norm_out")(h)
        h = nn.silu(h * (1 + scale) + shift)
        h = nn.Dropout(self.dropout)(h, deterministic=not train)
        h = conv(self.channels, self.dtypes, zero=True, name="conv_out")(h)
        if x.shape[-1] != self.channels:
            x = dense(self.channels, ("conv_in", "conv_out"), self.dtypes, name="shortcut")(x)
        return constrain(h + x)


class AttentionBlock(nn.Module):
    """Self-attention over pixels plus, with the same queries, attention to the condition.

    The two are separate softmaxes whose results are added; without `cross` there is only the
    first. `mlp` adds a GroupNorm + MLP of four times the width.
    """

    heads: int
    groups: int
    cross: bool
    mlp: bool
    dtypes: Mapping[str, Any]
    attention: str = "auto"

    @nn.compact
    def __call__(self, x: Features, states: Tokens | None, mask: Mask | None) -> Features:
        b, height, width, channels = x.shape
        h = GroupNorm(self.groups, **self.dtypes, name="norm")(x).reshape(b, -1, channels)
        qkv = dense(3 * channels, ("embed", "joined_kv"), self.dtypes, name="qkv")(h)
        query, key, value = jnp.split(qkv, 3, axis=-1)
        h = attend(query, key, value, self.heads, None, self.attention)
        if self.cross:
            condition = layer_norm(self.dtypes, name="cross_norm")(states)
            kv = dense(2 * channels, ("embed", "joined_kv"), self.dtypes, name="cross_kv")
            key, value = jnp.split(kv(condition), 2, axis=-1)
            h = h + attend(query, key, value, self.heads, mask, self.attention)
        h = dense(channels, ("joined_kv", "embed"), self.dtypes, zero=True, name="out")(h)
        x = constrain(x + h.reshape(b, height, width, channels))
        if self.mlp:
            h = GroupNorm(self.groups, **self.dtypes, name="mlp_norm")(x)
            h = gelu(dense(4 * channels, ("embed", "mlp"), self.dtypes, name="mlp_in")(h))
            x = x + dense(channels, ("mlp", "embed"), self.dtypes, zero=True, name="mlp_out")(h)
        return constrain(x)


class TokenBlock(nn.Module):
    """Pre-norm self-attention and GELU MLP over the condition's tokens."""

    heads: int
    dtypes: Mapping[str, Any]
    attention: str = "auto"

    @nn.compact
    def __call__(self, x: Tokens, mask: Mask | None) -> Tokens:
        width = x.shape[-1]
        h = layer_norm(self.dtypes, name="norm")(x)
        qkv = dense(3 * width, ("embed", "joined_kv"), self.dtypes, name="qkv")(h)
        h = attend(*jnp.split(qkv, 3, axis=-1), self.heads, mask, self.attention)
        x = x + dense(width, ("joined_kv", "embed"), self.dtypes, zero=True, name="out")(h)
        h = layer_norm(self.dtypes, name="mlp_norm")(x)
        h = gelu(dense(4 * width, ("embed", "mlp"), self.dtypes, name="mlp_in")(h))
        x = x + dense(width, ("mlp", "embed"), self.dtypes, zero=True, name="mlp_out")(h)
        return nn.with_logical_constraint(x, ("batch", "length", "embed"))
