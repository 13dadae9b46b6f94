"""The nested diffusion loss and its gradient against the reference (mdm_loss*.npz)."""

from __future__ import annotations

import json
import pathlib

import flax.traverse_util as traverse
import jax
import jax.numpy as jnp
import numpy as np

from kaleido_jax import diffusion, schedule
from kaleido_jax.interop import mdm
from kaleido_jax.losses import LossConfig, diffusion_loss
from tests.parity_mdm import load_network, nhwc

# ml-mdm names predictions of the noise after the sampler that uses them.
KINDS = {"v": "v", "v_prediction": "v", "eps": "eps", "ddpm": "eps", "ddim": "eps"}


def check_loss(path: pathlib.Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Loss per example, the x_t that were fed and the norm of every weight's gradient."""
    with np.load(path) as archive:
        file = dict(archive)
    settings = json.loads(str(file["config_json"]))
    model, params = load_network(file)
    config = model.config
    ratios = config.ratios
    cfg = LossConfig(
        schedules=schedule.shifted_schedules(
            settings["schedule"].lower(), ratios, shifted=settings["schedule_shifted"]
        ),
        ratios=ratios,
        prediction=KINDS[settings["prediction"].lower()],
        loss_target=KINDS[settings["loss_target"].lower()],
        latent_weight=0.0,
        cond_drop_rate=0.0,
        pixel_centre=127.5,
        pixel_scale=127.5,
    )
    images = diffusion.pyramid(nhwc(file["input/images"]), ratios)
    noises = tuple(nhwc(file[f"input/eps_{i}"]) for i in range(len(ratios)))
    states, mask = jnp.asarray(file["input/conditioning"]), jnp.asarray(file["input/mask"]) > 0

    @jax.jit
    def loss(params):
        def predict(x_t, time_index):
            return model.apply({"params": params}, x_t, time_index, states, mask)

        errors, x_t = diffusion_loss(
            predict, images, noises, jnp.asarray(file["input/time_index"]), cfg
        )
        return sum(errors).mean(), (sum(errors), x_t)

    grads, (per_example, x_t) = jax.grad(loss, has_aux=True)(params)
    norms = json.loads(str(file["grad_norms_json"]))
    got = {name: float(np.linalg.norm(value)) for name, value in mdm.to_mdm(grads, config).items()}
    names = sorted(norms)
    total = np.sqrt(sum(float(jnp.vdot(g, g)) for g in traverse.flatten_dict(grads).values()))
    result = {
        "loss_per_example": (np.asarray(per_example), file["output/loss_per_example"]),
        "grad_global_norm": (np.asarray(total), file["output/grad_global_norm"]),
        "grad_norms": (
            np.asarray([got[name] for name in names]),
            np.asarray([norms[n] for n in names]),
        ),
    }
    for i, x in enumerate(x_t):
        if f"output/x_t_{i}" in file:
            result[f"x_t_{i}"] = (np.moveaxis(np.asarray(x), -1, 1), file[f"output/x_t_{i}"])
    return result
