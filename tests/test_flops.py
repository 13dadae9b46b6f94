"""Counting operations: known products and convolutions, loops, parts, rematerialisation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kaleido_jax import flops
from kaleido_jax.train import Trainer
from kaleido_jax.types import Batch
from tests.tiny import tiny_config

A = jax.ShapeDtypeStruct((2, 3, 5), jnp.float32)
B = jax.ShapeDtypeStruct((2, 5, 7), jnp.float32)


def test_products_and_loops():
    once = 2 * 2 * 3 * 5 * 7

    def loop(a, b):
        return jax.lax.scan(lambda c, _: (c, a @ b), 0, length=4)[1]

    def branch(a, b):
        return jax.lax.cond(a.sum() > 0, lambda: a @ b @ b.mT, lambda: a)

    def until(a, b):
        return jax.lax.while_loop(lambda c: c.sum() > 0, lambda c: c @ b @ b.mT, a)

    assert flops.count(jax.jit(jnp.matmul), A, B) == {"other": once}
    assert flops.count(loop, A, B) == {"other": 4 * once}
    assert flops.count(branch, A, B) == {"other": 2 * once}
    assert flops.count(until, A, B, trips=6) == {"other": 12 * once}


@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_costs_as_much_backward_twice(stride):
    x, kernel = jnp.ones((2, 16, 16, 8)), jnp.ones((3, 3, 8, 4))

    def run(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ).sum()

    once = 2 * (2 * (16 // stride) ** 2 * 4) * (3 * 3 * 8)
    assert flops.count(run, x, kernel) == {"other": once}
    assert flops.count(jax.grad(run, (0, 1)), x, kernel) == {"other": 3 * once}


def test_flash_attention_counts_as_the_products_that_it_stands_for(monkeypatch):
    stablehlo = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    # Tracing asks for the GPU's versions; the program is only counted here, never run.
    monkeypatch.setattr(stablehlo, "check_cudnn_version", lambda: 91000)
    query = jax.ShapeDtypeStruct((2, 64, 4, 32), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((2, 48, 4, 32), jnp.bfloat16)

    def run(kind):
        def loss(*qkv):
            return jax.nn.dot_product_attention(*qkv, implementation=kind).sum()

        return flops.count(jax.grad(loss, (0, 1, 2)), query, key, key)

    assert run("cudnn") == run("xla") == {"other": 6 * 2 * (2 * 4 * 64 * 48 * 32)}


def _training(*overrides):
    trainer = Trainer(tiny_config(*overrides, nested=True))
    data, rows = trainer.config.data, trainer.config.train.batch_size
    batch = Batch(
        *(
            jax.ShapeDtypeStruct((rows, *shape), dtype)
            for shape, dtype in (
                ((data.caption_length,), np.int32),
                ((data.latent_length,), np.int32),
                ((data.image_size, data.image_size, data.channels), np.uint8),
                ((), np.uint32),
            )
        )
    )
    state = trainer.abstract_state()
    return flops.count(
        jax.grad(trainer.loss, has_aux=True), state.params, state.frozen, batch, state.step
    )


@pytest.mark.slow
def test_parts_of_a_training_step_and_what_is_computed_again():
    plain = _training()
    assert list(plain) == ["encoder", "decoder", "outer", "inner"]
    again = _training(
        *(f"model.{part}.remat_policy=full" for part in ("text_encoder", "latent_decoder"))
    )
    assert again.pop(flops.RECOMPUTED) > plain["encoder"]
    assert again == plain
    frozen = _training("model.freeze_encoder=True")
    # Forward alone, and a frozen encoder has nothing else.
    assert frozen["encoder"] == pytest.approx(plain["encoder"] / 3, rel=0.05)
    stacked = _training(
        "model.text_encoder.scan_layers=True", "model.latent_decoder.scan_layers=True"
    )
    assert stacked == plain
