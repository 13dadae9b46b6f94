"""Attention and upsampling of the networks against their plain forms."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kaleido_jax.errors import UserError
from kaleido_jax.models import layers


def test_flash_attention_is_taken_where_it_is_to_be_had_only():
    choose = layers.attention_implementation
    assert choose("auto", jnp.bfloat16, 64, "gpu") == "cudnn"
    for dtype, width, backend in [("float32", 64, "gpu"), ("bfloat16", 60, "gpu"),
                                  ("bfloat16", 256, "gpu"), ("bfloat16", 64, "cpu"),
                                  ("bfloat16", 64, "tpu")]:  # fmt: skip
        assert choose("auto", dtype, width, backend) == "xla"
        with pytest.raises(UserError, match=f"'cudnn' needs a GPU.* here are {backend}"):
            choose("cudnn", dtype, width, backend)
    assert choose("xla", jnp.bfloat16, 64, "gpu") == "xla"


def test_even_lengths_leave_attention_as_it_is():
    rng = np.random.default_rng(0)
    query, key, value = (jnp.array(rng.normal(size=(2, n, 2, 8)), "float32") for n in (5, 7, 7))
    mask = jnp.array(rng.random((2, 7)) < 0.6)
    plain = jax.nn.dot_product_attention(query, key, value, mask=mask[:, None, None, :])
    arrays, allowed = layers.even_lengths((query, key, value), mask[:, None, None, :])
    assert [x.shape[1] for x in arrays] == [6, 8, 8] and allowed.shape == (2, 1, 6, 8)
    padded = jax.nn.dot_product_attention(*arrays, mask=allowed)[:, :5]
    np.testing.assert_allclose(plain, padded, atol=1e-6)


@pytest.mark.gpu
def test_flash_attention_agrees_with_the_plain_one():
    rng = np.random.default_rng(0)
    query, key, value = (jnp.array(rng.normal(size=(2, n, 128)), "bfloat16") for n in (65, 77, 77))
    mask = jnp.array(rng.random((2, 77)) < 0.5).at[1].set(False)

    def both(how):
        total = lambda *x: layers.attend(*x, 2, mask, how).astype("float32").sum()  # noqa: E731
        return layers.attend(query, key, value, 2, mask, how), *jax.grad(total, (0, 1, 2))(
            query, key, value
        )

    for plain, flash in zip(both("xla"), both("cudnn"), strict=True):
        np.testing.assert_allclose(
            np.asarray(plain, "float32"), np.asarray(flash, "float32"), atol=0.03
        )


def test_upsampling_within_the_convolution_is_that_before_it():
    dtypes = dict(dtype=jnp.float32, param_dtype=jnp.float32)
    draw = np.random.default_rng(0)
    x, seen = (draw.normal(size=(2, side, side, 6)).astype(np.float32) for side in (5, 10))
    fused, plain = layers.UpConv(6, **dtypes), layers.conv(6, dtypes)
    params = nn.meta.unbox(fused.init(jax.random.key(0), x))
    wide = lambda x: jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)  # noqa: E731
    np.testing.assert_array_equal(
        params["params"]["kernel"],
        nn.meta.unbox(plain.init(jax.random.key(0), seen))["params"]["kernel"],
    )
    params["params"]["bias"] = jnp.arange(6.0)

    def value(run, params, x):
        return jnp.sum(seen * run(params, x))

    ways = [fused.apply, lambda params, x: plain.apply(params, wide(x))]
    np.testing.assert_allclose(*(run(params, x) for run in ways), rtol=1e-5, atol=1e-5)
    made, wanted = (jax.grad(functools.partial(value, run), (0, 1))(params, x) for run in ways)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-4), made, wanted)
