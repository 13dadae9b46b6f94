"""Parity with torch-fidelity's Inception network, and with prdc's and scipy's metrics."""

from __future__ import annotations

import pathlib
import re

import flax.traverse_util as traverse
import jax
import numpy as np

from kaleido_jax.interop import inception as weights
from kaleido_jax.metrics import frechet, neighbours
from kaleido_jax.models.inception import Inception
from tests.carried import carry
from tests.parity_mdm import nhwc
from tests.reference_rule import weights_of

Checked = dict[str, tuple[np.ndarray, np.ndarray]]
GAIN = np.float32(1.6)  # of weights with two or more dimensions: ReLU takes half of the signal


def check_inception(path: pathlib.Path) -> Checked:
    """Features and logits for every size of picture in an `inception` file."""
    with np.load(path, allow_pickle=False) as archive:
        file = dict(archive)
    state = {n: w * GAIN if w.ndim > 1 else w for n, w in weights_of(file).items()}
    tensors = weights.inception_tensors(state)
    variables = carry(traverse.unflatten_dict({p: np.asarray(t) for p, t in tensors.items()}))
    apply = jax.jit(Inception().apply)
    checked = {}
    for name in file:
        if not (match := re.fullmatch(r"input/images_(\w+)", name)):
            continue
        found = apply(variables, nhwc(file[name]))
        for key, want in file.items():
            if key.startswith(f"output/{match[1]}/"):
                checked[key.removeprefix("output/")] = (found[key.split("/")[-1]], want)
    return checked


def check_metrics(path: pathlib.Path) -> Checked:
    """FID, and precision, recall, density and coverage at every k of a `metrics` file."""
    with np.load(path, allow_pickle=False) as archive:
        file = dict(archive)
    real, fake = file["real"], file["fake"]
    names = {n: re.fullmatch(r"k(\d+)_(precision|recall|density|coverage)", n) for n in file}
    ks = sorted({int(match[1]) for match in names.values() if match})
    found = neighbours.manifolds(real, fake, ks, size=128)
    checked = {}
    for name, match in names.items():
        if name == "fid":
            got = frechet.frechet_distance(frechet.moments(real), frechet.moments(fake))
        elif match:
            got = getattr(found[int(match[1])], match[2]).mean()
        else:
            continue
        checked[name] = (np.asarray(got), file[name])
    return checked
