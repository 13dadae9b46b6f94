"""The dry run's figures against states that were made, sums by hand, and the compiler's."""

from __future__ import annotations

import json
import math
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from kaleido_jax import cli, cli_dry_run, dry_run, memory_plan, train
from tests.test_train import first_batch
from tests.tiny import tiny_config

FSDP = ("mesh.data=2", "mesh.fsdp=4", "mesh.tensor=1")


def on_device(tree):
    """Bytes that the first device holds."""
    first = jax.devices()[0]
    return sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(tree)
        for shard in leaf.addressable_shards
        if shard.device == first
    )


def test_bytes_are_those_of_a_state_that_was_made_and_of_the_compiler():
    trainer = train.Trainer(tiny_config("model.freeze_encoder=True", *FSDP, name="toy"))
    told = dry_run.state_bytes(trainer)
    state = trainer.init()
    for name in ("params", "frozen", "opt_state", "ema"):
        assert told[name] == on_device(getattr(state, name)) > 0, name
    assert told["batch"] == on_device(trainer.put(first_batch(trainer.config)))
    leaves = dry_run.parameters(trainer)
    assert sum(leaf.local_bytes for leaf in leaves) == told["params"] + told["frozen"]
    assert sum(leaf.local_bytes for leaf in leaves if leaf.trained) == told["params"]
    assert {leaf.part for leaf in leaves} == {"encoder", "decoder", "denoiser"}
    # What divides is in quarters, and says so.
    kernel = next(leaf for leaf in leaves if leaf.name.endswith("layers_0/mlp/wi_0/kernel"))
    assert kernel.sharding == "fsdp,-" and kernel.local_bytes * 4 == kernel.size * 4
    found = memory_plan.plan(trainer)
    held = sum(told[name] for name in ("params", "frozen", "opt_state", "ema", "batch"))
    # The step's number, and arrays that start at whole lines of the cache.
    arrays = len(jax.tree.leaves(state)) + 4
    assert 0 <= found["arguments"] - held <= 64 * arrays
    assert found["total"] == sum(found[k] for k in ("arguments", "results", "temporaries"))
    assert found["temporaries"] > 0


def test_what_is_read_of_a_layout_is_what_the_compiler_tells_of_it(tmp_path):
    def small(x, y):
        total, sums = jax.lax.scan(lambda c, _: (jnp.sin(c @ y) + c, c.sum()), x, length=7)
        return total, sums, jnp.outer(sums, sums)

    shape = jax.ShapeDtypeStruct((128, 128), jnp.float32)
    lowered = jax.jit(small, donate_argnums=0).lower(shape, shape)
    dump = {"xla_dump_to": str(tmp_path), "xla_dump_hlo_module_re": "jit_small"}
    told = lowered.compile(dump).memory_analysis()
    assert memory_plan.read_layout(tmp_path) == {
        "arguments": told.argument_size_in_bytes,
        "results": told.output_size_in_bytes - told.alias_size_in_bytes,
        "temporaries": told.temp_size_in_bytes,
    }
    assert told.alias_size_in_bytes == 4 * 128 * 128 < told.temp_size_in_bytes


def test_operations_are_those_counted_by_hand():
    cfg = tiny_config("model.freeze_encoder=True", "model.text_encoder.num_encoder_layers=2")
    trainer = train.Trainer(cfg, devices=jax.devices()[:1])
    counts = dry_run.operations(trainer)
    length, t = cfg.data.caption_length, cfg.model.text_encoder
    width = t.num_heads * t.head_dim

    # Four projections, two products of attention, three kernels of the MLP, each 2 x m x n x k.
    def layer(n):
        return 2 * (4 * n * t.emb_dim * width + 2 * n * n * width + 3 * n * t.emb_dim * t.mlp_dim)

    # The empty caption of the null condition is read once a step, a token long.
    encoder = 2 * (layer(length) + layer(1) / cfg.train.batch_size)
    assert counts["forward"]["encoder"] == counts["training"]["encoder"] == encoder
    d = cfg.model.latent_decoder
    n, width = cfg.data.latent_length + 1, d.num_heads * d.head_dim
    project = 2 * d.emb_dim * width
    once = (
        (4 * n + 2 * n + 2 * length) * project  # to itself, to the caption
        + 2 * 2 * (n * n + n * length) * width
        + 3 * 2 * n * d.emb_dim * d.mlp_dim
        + 2 * n * d.emb_dim * d.vocab_size
    )
    assert counts["forward"]["decoder"] == once
    # Backward each product gives two, but nothing goes back to the frozen encoder's states.
    assert counts["training"]["decoder"] == 3 * once - 2 * length * project
    assert 2.9 < counts["training"]["denoiser"] / counts["forward"]["denoiser"] <= 3.0


def run(capsys, *words):
    assert cli.main(["train", "--dry-run", *words]) == 0
    return capsys.readouterr()


def test_tables_and_json_say_the_same(capsys):
    words = ("--config", "toy", "--config.train.batch_size=8")
    printed = run(capsys, *words, "--no-compile")
    config = json.loads(printed.out)
    told = json.loads(run(capsys, *words, "--no-compile", "--json").out)
    assert told["config"] == config and "memory_per_device" not in told
    total = sum(row["parameters"] for row in told["parameters"])
    assert f"parameters: {total:,} trained, 0 frozen" in printed.err
    assert "sharding" in printed.err and "GFLOP per image" in printed.err
    every = json.loads(run(capsys, *words, "--no-compile", "--json", "--every-parameter").out)
    assert sum(math.prod(row["largest"]) for row in every["parameters"]) == total
    assert all(row["arrays"] == 1 for row in every["parameters"])


def test_more_devices_than_there_are_in_a_process_of_their_own():
    words = "train --dry-run --config toy --simulate-devices 16 --json --no-compile".split()
    more = ["--config.mesh.fsdp=16", "--config.train.batch_size=32"]
    done = subprocess.run(
        [sys.executable, "-m", "kaleido_jax.cli", *words, *more],
        env=os.environ, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["mesh"] == {"data": 1, "fsdp": 16, "tensor": 1}
    kernel = next(row for row in told["parameters"] if row["name"].endswith("decoder/layers_*"))
    assert kernel["bytes_per_device"] < 4 * kernel["parameters"] / 8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--dry-run --simulate-devices 3", "needs a process of its own"),
        ("--no-compile", "--no-compile needs --dry-run"),
    ],
)
def test_misuse_is_one_line(capsys, words, message):
    before, devices = os.environ.get("XLA_FLAGS"), len(jax.devices())
    assert cli.main(["train", "--config", "toy", *words.split()]) == 2
    line = capsys.readouterr().err
    assert message in line and line.count("\n") == 1
    assert os.environ.get("XLA_FLAGS") == before and len(jax.devices()) == devices == 8


def test_columns():
    text = cli_dry_run.table(["name", "size"], [["a", "1.00 MB"], ["long", "20 B"]])
    assert text.splitlines() == ["name     size", "a     1.00 MB", "long     20 B"]


@pytest.mark.long
def test_the_paper_size_model_fits_64_devices_of_40_gigabytes():
    """16 images on each, as the CPU's compiler lays the step out: minutes, and 4 GB of memory."""
    free = int(re.search(r"MemAvailable:\s+(\d+)", pathlib.Path("/proc/meminfo").read_text())[1])
    if free < 8e6:
        pytest.skip(f"{free / 1e6:.1f} GB of memory are free; it takes up to 8")
    words = "train --dry-run --config cc12m_256 --simulate-devices 64 --json".split()
    done = subprocess.run(
        [sys.executable, "-m", "kaleido_jax.cli", *words, "--config.train.batch_size=1024"],
        env=os.environ, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["mesh"]["fsdp"] == 64
    parts = told["parameters_by_part"]
    assert parts["outer"]["trained"] + parts["inner"]["trained"] == 449_833_286
    held = sum(told["bytes_per_device"][name] for name in ("params", "frozen", "opt_state", "ema"))
    assert held < 0.65e9
    assert told["memory_per_device"]["arguments"] == pytest.approx(held, rel=0.02)
    assert told["memory_per_device"]["total"] < 40e9
