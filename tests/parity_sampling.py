"""Parity with ml-mdm's sampler: schedules, single steps, time grids and the whole loop."""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kaleido_jax import diffusion, guidance, rng, samplers
from kaleido_jax.schedule import NAMES, Schedule, shifted_schedules, time_grid
from tests.parity_mdm import load_network, nchw, nhwc, numbered

Checked = dict[str, tuple[np.ndarray, np.ndarray]]

TABLE = re.compile(r"schedule/(\w+)/alpha_bar(?:_shift([\d.]+)_power([\d.]+))?")
STEP = re.compile(r"step/t(\d+)_s(\d+)/(?:(ddpm|ddim)(?:_eta([\d.]+))?_(\w+)/)?(\w+)")
GRID = re.compile(r"timesteps_(\d+)")


def check_sampler(path: pathlib.Path) -> Checked:
    """Schedules, single steps t -> s and time grids of an `mdm_sampler` file."""
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    schedule = _step_schedule(arrays)
    checked = {}
    for name, want in arrays.items():
        if match := TABLE.fullmatch(name):
            kind, scale, power = match.groups()
            got = Schedule(kind, float(scale or 1), float(power or 1)).alpha_bar_table
        elif match := GRID.fullmatch(name):
            got = time_grid(int(match[1]))
        elif match := STEP.fullmatch(name):
            got = _step_output(arrays, schedule, *match.groups())
        else:
            continue
        checked[name] = (got, want)
    return checked


def _step_schedule(arrays: Mapping[str, np.ndarray]) -> Schedule:
    """The schedule of the single steps, which the file shows but does not name."""
    steps = [STEP.fullmatch(name) for name in arrays]
    levels = {int(match[1]): arrays[match[0]] for match in steps if match and match[6] == "x_t"}

    def distance(name: str) -> float:
        return sum(
            np.abs(_noised(arrays, Schedule(name), level) - x_t).max()
            for level, x_t in levels.items()
        )

    return Schedule(min(NAMES, key=distance))


def _noised(arrays: Mapping[str, np.ndarray], schedule: Schedule, level: int) -> np.ndarray:
    x, eps = arrays["input/x"], arrays["input/eps"]
    return diffusion.q_sample(x, eps, *schedule.alpha_sigma(level))


def _step_output(
    arrays: Mapping[str, np.ndarray],
    schedule: Schedule,
    t: str,
    s: str,
    sampler: str | None,
    eta: str | None,
    threshold: str | None,
    output: str,
) -> np.ndarray:
    t, s = int(t), int(s)
    alpha, sigma = schedule.alpha_sigma(t)
    x, eps = arrays["input/x"], arrays["input/eps"]
    if output == "x_t":
        return _noised(arrays, schedule, t)
    if output == "v_target":
        return alpha * eps - sigma * x
    x_t = nhwc(arrays[f"step/t{t}_s{s}/x_t"])
    v = nhwc(arrays["input/v_prediction"])
    x0 = diffusion.to_x0("v", v, x_t, np.float32(alpha), np.float32(sigma))
    x0 = samplers.THRESHOLDS[threshold](x0)
    if output == "x0":
        return nchw(x0)
    table = schedule.alpha_bar_table
    if sampler == "ddpm":
        coefficients = samplers.ddpm_coefficients(table[t], table[s])
    else:
        coefficients = samplers.ddim_coefficients(table[t], table[s], float(eta))
    coefficients = np.asarray(coefficients, np.float32)
    return nchw(samplers.step(x_t, x0, coefficients, nhwc(arrays["input/noise"])))


def check_sample(path: pathlib.Path) -> Checked:
    """The whole guided sampling loop of an `mdm_sample` file."""
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    settings = json.loads(str(arrays["config_json"]))
    model, params = load_network(arrays)
    schedules = shifted_schedules(
        settings["schedule"].lower(), model.config.ratios, shifted=settings["schedule_shifted"]
    )
    mask = jnp.asarray(arrays["input/mask"] > 0)

    def encode(states: np.ndarray) -> Any:
        method = type(model).encode_condition
        return model.apply({"params": params}, jnp.asarray(states), mask, method=method)

    def denoise(x_t, level, condition):
        time_index = jnp.full((x_t[0].shape[0],), level - 1, jnp.float32)
        method = type(model).denoise
        predictions = model.apply({"params": params}, x_t, time_index, condition, method=method)
        return tuple(
            diffusion.to_x0(settings["prediction"], pred, x, *schedule.alpha_sigma(level))
            for pred, x, schedule in zip(predictions, x_t, schedules, strict=True)
        )

    @jax.jit
    def run(noise):
        guided = guidance.guide(
            denoise,
            encode(arrays["input/conditioning"]),
            encode(arrays["input/null_conditioning"]),
            settings["guidance_weight"],
        )
        keys = rng.per_sample(rng.stream(0, "sample"), jnp.arange(noise[0].shape[0]))
        return samplers.ddim(
            guided,
            noise,
            arrays["input/timesteps"],
            schedules,
            keys,
            settings["threshold"],
            eta=settings["ddim_eta"],
        )

    samples = run(tuple(jnp.asarray(nhwc(noise)) for noise in numbered(arrays, "input/noise_")))
    wanted = numbered(arrays, "output/sample_")
    return {f"sample_{i}": (nchw(samples[i]), want) for i, want in enumerate(wanted)}
