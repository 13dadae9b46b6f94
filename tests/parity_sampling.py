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

from kaleido_jax import decode, diffusion, guidance, rng, samplers
from kaleido_jax.schedule import NAMES, Schedule, shifted_schedules, time_grid
from kaleido_jax.thresholds import THRESHOLDS
from tests.parity_mdm import load_network, nchw, nhwc, numbered

Checked = dict[str, tuple[np.ndarray, np.ndarray]]

TABLE = re.compile(r"schedule/(\w+)/alpha_bar(?:_shift([\d.]+)_power([\d.]+))?")
STEP = re.compile(r"step/t(\d+)_s(\d+)/(?:(ddpm|ddim)(?:_eta([\d.]+))?_(\w+)/)?(\w+)")
GRID = re.compile(r"timesteps_(\d+)")
FILTER = re.compile(r"probabilities/temperature([\d.]+)_topk(\d+)_topp([\d.]+)")


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
    x0 = THRESHOLDS[threshold](x0)
    if output == "x0":
        return nchw(x0)
    table = schedule.alpha_bar_table
    if sampler == "ddpm":
        coefficients = samplers.ddpm_coefficients(table[t], table[s])
    else:
        coefficients = samplers.ddim_coefficients(table[t], table[s], float(eta))
    coefficients = {name: np.float32(value) for name, value in coefficients.items()}
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
            samplers.begin(noise),
            arrays["input/timesteps"],
            schedules,
            keys,
            settings["threshold"],
            eta=settings["ddim_eta"],
        ).x_t

    samples = run(tuple(jnp.asarray(nhwc(noise)) for noise in numbered(arrays, "input/noise_")))
    wanted = numbered(arrays, "output/sample_")
    return {f"sample_{i}": (nchw(samples[i]), want) for i, want in enumerate(wanted)}


def check_guidance(path: pathlib.Path) -> Checked:
    """Classifier-free, projected and rescaled guidance, and the decoder's filters."""
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    settings = json.loads(str(arrays["settings_json"]))
    weight = settings["guidance_weight"]
    projection = guidance.Projection(
        settings["apg_eta"], settings["apg_norm_threshold"], settings["apg_momentum"]
    )
    rules = {
        "cfg": guidance.classifier_free(weight),
        "cfg_rescaled": guidance.rescaled(guidance.classifier_free(weight), settings["rescale"]),
        "apg": guidance.projected(weight, projection),
    }
    checked = {}
    for name, rule in rules.items():
        memory = (jnp.zeros(nhwc(arrays["cond"][0]).shape),) if name == "apg" else ()
        steps = []
        for cond, uncond in zip(arrays["cond"], arrays["uncond"], strict=True):
            pair = [(jnp.asarray(nhwc(x), jnp.float32),) for x in (cond, uncond)]
            (x0,), memory = rule(pair, memory)
            steps.append(nchw(x0))
        checked[name] = (np.stack(steps), arrays[name])
    for name, want in arrays.items():
        if match := FILTER.fullmatch(name):
            temperature, top_k, top_p = float(match[1]), int(match[2]), float(match[3])
            logits = jnp.asarray(arrays["logits"], jnp.float32)
            kept = decode.filter_logits(logits, temperature, top_k, top_p)
            checked[name] = (jax.nn.softmax(kept, axis=-1), want)
    return checked


def check_solver(path: pathlib.Path) -> Checked:
    """Every step of DDIM and DPM-Solver++ on Gaussian data, whose denoiser is known."""
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    mean, variance = float(arrays["data_mean"]), float(arrays["data_variance"])
    schedule = Schedule("deepfloyd")
    keys = rng.per_sample(rng.stream(0, "sample"), jnp.arange(1))
    noise = (jnp.asarray(arrays["x_T"], jnp.float32)[None, :, :, None],)

    def denoise(x_t, level, memory):
        alpha, sigma = schedule.alpha_sigma(level)
        gain = alpha * variance / (alpha**2 * variance + sigma**2)
        return tuple(mean + gain * (x - alpha * mean) for x in x_t), memory

    checked = {}
    for name, sampler in (("ddim", samplers.ddim), ("dpmpp_2m", samplers.dpmpp)):
        # diffusers counts its 1,000 levels from 0, at the first noise.
        levels = np.append(arrays[f"{name}/timesteps"] + 1, 0)
        checked[f"{name}/alpha_bar"] = (
            schedule.alpha_bar_table[levels[:-1]],
            arrays[f"{name}/alpha_bar"],
        )
        state, states = samplers.begin(noise), []
        for index in range(len(levels) - 1):
            state = sampler(
                denoise, state, levels, (schedule,), keys, "none", steps=(index, index + 1)
            )
            states.append(np.asarray(state.x_t[0])[0, :, :, 0])
        checked[f"{name}/x"] = (np.stack(states), arrays[f"{name}/x"])
    return checked
