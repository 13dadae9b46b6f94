"""The measurement of training: what it says, how it ends where memory does."""

from __future__ import annotations

import json

import jax
import pytest

from kaleido_jax import cli, optim
from kaleido_jax.bench import measured, training
from kaleido_jax.errors import UserError
from kaleido_jax.train import Trainer
from tests.tiny import tiny_config

WORDS = ["bench", "train", "--config", "toy", "--repeats", "2", "--warmup", "1"]
TINY = [
    f"--config.model.{part}.{key}={value}"
    for part in ("text_encoder", "latent_decoder")
    for key, value in dict(emb_dim=16, num_heads=2, head_dim=8, mlp_dim=16).items()
] + ["--config.model.denoiser.width=16", "--config.model.denoiser.conditioning_feature_dim=16"]


def lines(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.slow
def test_a_sweep_doubles_the_batch(capsys, tmp_path):
    words = [*WORDS, *TINY, "--batch-size", "8", "--sweep", "--largest", "31"]
    assert cli.main([*words, "--profile", str(tmp_path / "trace")]) == 0
    made = lines(capsys)
    assert [(line["batch_size"], line["fits"]) for line in made] == [(8, True), (16, True)]
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))
    for line in made:
        assert line["memory"]["estimated_bytes"] > 1000
        assert line["images_per_second"] == pytest.approx(
            line["batch_size"] / line["step_seconds"]["median"], rel=1e-3
        )
        assert line["utilisation"] == pytest.approx(
            line["flops_per_second"] / line["peak_flops_per_second"], abs=1e-3
        )
        assert line["config"] == "toy" and "jax" in line["versions"] and line["device"]
    # Operations are those of a batch: twice the rows, twice the work.
    first, second = (sum(line["flops_per_step"].values()) for line in made)
    assert second == pytest.approx(2 * first, rel=0.01)


def test_a_sweep_ends_where_memory_does():
    def measure(size):
        if size > 16:
            raise measured.DoesNotFit("too much")
        return {"batch_size": size}

    made = list(measured.sweep(measure, 4, 2**16, {"bench": "train"}))
    assert [(line["batch_size"], line["fits"]) for line in made] == [
        (4, True),
        (8, True),
        (16, True),
        (32, False),
    ]
    assert made[-1] == {"bench": "train", "batch_size": 32, "fits": False, "reason": "too much"}


@pytest.mark.slow
def test_nothing_fits(capsys):
    assert cli.main([*WORDS, *TINY, "--batch-size", "8", "--memory", "1e-6"]) == 2
    captured = capsys.readouterr()
    assert json.loads(captured.out)["fits"] is False
    assert "not even a batch of 8 fits" in captured.err


@pytest.mark.slow
def test_the_baseline_is_the_same_batch_without_latents():
    config = tiny_config("latents=text", "data.latent_length=12", name="toy")
    made = training.measure(config, training.Settings(repeats=2, warmup=1, baseline=True))
    with_latents, without = made["flops_per_step"], made["baseline"]["flops_per_step"]
    assert "decoder" in with_latents and "decoder" not in without
    ratio = sum(with_latents.values()) / sum(without.values())
    assert made["flops_ratio"] == pytest.approx(ratio, abs=1e-3) and ratio > 1
    times = made["step_seconds"]["median"] / made["baseline"]["step_seconds"]["median"]
    assert made["time_ratio"] == pytest.approx(times, abs=1e-3)
    # It is written with four digits behind the point, which is more than rel where it is small.
    assert made["time_over_flops"] == pytest.approx(times / ratio, rel=1e-3, abs=5e-5)
    with pytest.raises(UserError, match="there are none here"):
        training.measure(tiny_config("latents=()", name="toy"), training.Settings(baseline=True))


def test_the_denoiser_alone():
    config = tiny_config(name="toy")
    made = training.measure(config, training.Settings(repeats=1, warmup=1, denoiser_only=True))
    params = Trainer(config).abstract_state().params
    assert made["parameters"] == optim.count_parameters(params["denoiser"])
    assert made["what"] == "denoiser" and set(made["flops_per_step"]) <= {"other", "denoiser"}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("TPU v5", 459e12),
        ("TPU v5 lite", 197e12),
    ],
)
def test_peaks_by_the_longest_name(kind, expected):
    assert measured.peak(kind)[0] == expected * len(jax.devices())


def test_a_measured_peak_says_so():
    flops, source = measured.peak()
    assert flops > 1e8 and source.startswith("measured")


def test_memory_that_a_device_refuses_is_told_and_other_errors_are_not_hidden():
    def refuse():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")

    def fail():
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    with pytest.raises(measured.DoesNotFit, match="Out of memory"):
        measured.fitting(refuse)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        measured.fitting(fail)
