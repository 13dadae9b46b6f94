"""Meshes and shardings: presets, what is divided and where, activations inside the step."""

from __future__ import annotations

import math

import flax.linen as nn
import flax.traverse_util as traverse
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kaleido_jax import bundle, config, mesh, train
from kaleido_jax.errors import UserError
from tests.tiny import CONFIGS, tiny_config

PAPER = str(CONFIGS / "cc12m_256.py")


def first_batch(cfg):
    return train.make_loader(cfg, bundle.make_vocabulary(cfg)).batch(0)


def sizes(*names):
    return [f"mesh.{axis}={size}" for axis, size in zip(mesh.AXES, names, strict=True)]


def test_presets_fill_their_machines_and_are_refused_on_others():
    for name, shape in mesh.PRESETS.items():
        devices = int(name.rsplit("-", 1)[1]) // (2 if "v4" in name or "v5p" in name else 1)
        assert math.prod(shape) == devices, name
    made = mesh.make_mesh(data=3, preset="gpu-8")
    assert dict(made.shape) == {"data": 1, "fsdp": 8, "tensor": 1}
    with pytest.raises(UserError, match=r"'a100-64' asks for .* = 8 x 8 x 1; .* devices, 8"):
        mesh.make_mesh(preset="a100-64")
    with pytest.raises(UserError, match="'gpu-9'; one of gpu-1, gpu-8"):
        mesh.make_mesh(preset="gpu-9")
    with pytest.raises(UserError, match=r"= 3 x -1 x 1; .* devices, 8"):
        mesh.make_mesh(data=3, fsdp=-1)


@pytest.mark.parametrize(
    ("shape", "axes", "spec"),
    [
        ((32, 512), ("embed", "mlp"), ("fsdp", "tensor")),
        # Three channels in: the channels out bear both.
        ((3, 3, 3, 4096), ("height", "width", "conv_in", "conv_out"),
         (None, None, None, ("tensor", "fsdp"))),
        # 129 rows: the head's columns instead.
        ((128, 129), ("embed", "vocab"), (("fsdp", "tensor"), None)),
        # The longest axis left is the scan's, which stays whole.
        ((8, 4096, 3), ("mlp", "layers", None), (("tensor", "fsdp"), None, None)),
        ((6, 4096, 3), ("mlp", "layers", None), ("tensor", None, None)),
        # Small ones are not worth a gather; no axis can be divided.
        ((64,), ("conv_out",), ("tensor",)),
        ((129, 129), ("embed", "mlp"), (None, None)),
    ],
)  # fmt: skip
def test_another_axis_is_divided_where_the_named_one_cannot_be(shape, axes, spec):
    made = mesh.make_mesh(data=1, fsdp=4, tensor=2)
    boxed = {"leaf": nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), axes)}
    assert tuple(mesh.param_shardings(boxed, made)["leaf"].spec) == spec


def whole_leaves(tree, shardings):
    """Names and shapes of large leaves that lie whole on every device."""
    flat, lies = (traverse.flatten_dict(t, sep="/") for t in (tree, shardings))
    return {
        name: leaf.shape
        for name, leaf in flat.items()
        if leaf.size >= mesh.LARGE and lies[name].is_fully_replicated
    }


def test_nothing_large_is_copied_at_the_papers_size():
    """Parameters, slots, average and frozen encoder of the 256-pixel model, from shapes alone."""
    cfg = config.load_config(PAPER, ["mesh.preset=gpu-8"])
    trainer = train.Trainer(cfg)
    state = trainer.abstract_state()
    adam = next(s for s in state.opt_state if hasattr(s, "mu"))
    lies = next(s for s in trainer.shardings.opt_state if hasattr(s, "mu"))
    for tree, shardings in (
        (state.params, trainer.shardings.params),
        (state.ema, trainer.shardings.ema),
        (state.frozen, trainer.shardings.frozen),
        (adam.mu, lies.mu),
        (adam.nu, lies.nu),
    ):
        assert whole_leaves(tree, shardings) == {}
        held = sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(tree)
        )
        assert held < 1.002 * sum(leaf.size for leaf in jax.tree.leaves(tree)) / 8
    # T5 is divided along tensor too, whatever its stack.
    with_tensor = train.Trainer(config.load_config(PAPER, sizes(1, 4, 2))).abstract_state()
    t5 = traverse.flatten_dict(with_tensor.frozen, sep="/")
    kernels = [v for k, v in t5.items() if k.endswith(("kernel", "embedding")) and v.size > 2**20]
    assert len(kernels) >= 8
    assert all({"tensor", "fsdp"} <= set(jax.tree.leaves(tuple(v.sharding.spec))) for v in kernels)


def test_every_process_reads_the_rows_that_its_devices_hold():
    """One process holds all rows here; each device gets its own of the batch."""
    trainer = train.Trainer(tiny_config(*sizes(2, 2, 2)))
    np.testing.assert_array_equal(trainer.rows, np.arange(8))
    batch = first_batch(trainer.config)
    put = trainer.put(batch)
    for shard in put.image.addressable_shards:
        np.testing.assert_array_equal(shard.data, batch.image[shard.index])
        assert shard.data.shape[0] == 2
    # A loader of some rows reads those of the whole batch.
    loader = train.make_loader(trainer.config, bundle.make_vocabulary(trainer.config), [1, 6])
    np.testing.assert_array_equal(loader.batch(0).key_hash, batch.key_hash[[1, 6]])


def small(*overrides):
    """Two resolutions, quick to compile."""
    cfg = tiny_config(*overrides, "model.freeze_encoder=True", nested=True)
    with cfg.unlocked():
        outer = dict(resolution_channels=(8, 8), num_resnets_per_resolution=(1, 1))
        cfg.model.denoiser.update(outer | dict(num_attention_layers=(0, 0)))
        inner = dict(resolution_channels=(8,), num_resnets_per_resolution=(1,))
        inner |= dict(num_attention_layers=(1,), skip_mid_blocks=True, patch_size=1)
        cfg.model.denoiser.inner.update(inner)
    return cfg.lock()


def losses(trainer, steps):
    loader = train.make_loader(trainer.config, bundle.make_vocabulary(trainer.config))
    state, seen = trainer.init(), []
    for step in range(steps):
        state, metrics = trainer.step(state, trainer.put(loader.batch(step)))
        seen.append({k: float(v) for k, v in jax.device_get(metrics).items()})
    return seen


def worst(one, other):
    """Largest relative difference of a loss."""
    pairs = [(a[k], b[k]) for a, b in zip(one, other, strict=True) for k in a if "loss" in k]
    return max(abs(b / a - 1) for a, b in pairs)


@pytest.mark.slow
def test_a_mixed_mesh_divides_activations_and_gives_the_losses_of_one_device():
    """Rows lie over data x fsdp and the denoiser's channels over tensor, inside the real step.

    The compiler is asked (flax would silently ignore logical constraints where no mesh is set).
    Draws are global, so only the order of float32 sums differs: docs/scaling.md.
    """
    seen: dict[str, list] = {"EncoderLayer": [], "DecoderLayer": [], "Level": []}

    def watch(next_function, args, kwargs, context):
        out = next_function(*args, **kwargs)
        kind = type(context.module).__name__
        if context.method_name == "__call__" and kind in seen:
            for leaf in jax.tree.leaves(out):
                note = lambda s, x=leaf.shape: seen[kind].append((x, s.shard_shape(x)))  # noqa: E731
                if leaf.shape[0] == 8:  # not the empty caption
                    jax.debug.inspect_array_sharding(leaf, callback=note)
        return out

    trainer = train.Trainer(small(*sizes(2, 2, 2)))
    with nn.intercept_methods(watch):
        many = losses(trainer, 3)
    for kind, found in seen.items():
        assert found, kind
        assert all(part[0] == 2 for _, part in found), (kind, found)
        if kind == "Level":
            assert all(part == (2, *whole[1:3], 4) for whole, part in found), found
    one = losses(train.Trainer(small(), devices=jax.devices()[:1]), 3)
    assert worst(one, many) < 1e-4


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_every_mesh_gives_the_losses_of_one_device_for_twenty_steps():
    one = losses(train.Trainer(small(), devices=jax.devices()[:1]), 20)
    for shape in [(8, 1, 1), (2, 4, 1), (2, 2, 2), (1, 8, 1)]:
        difference = worst(one, losses(train.Trainer(small(*sizes(*shape))), 20))
        print(f"mesh {shape}: largest relative difference of a loss {difference:.1e}")
        assert difference < 1e-4, shape
