"""Library manners: small import, no training libraries, threads, types, the script in docs/."""

from __future__ import annotations

import inspect
import os
import pathlib
import shutil
import subprocess
import sys
import typing
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

import kaleido_jax
from kaleido_jax import Pipeline, mesh
from tests import portable

ROOT = pathlib.Path(__file__).resolve().parent.parent


def run(*words: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, *words],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("portable")
    result = run("-m", "tests.portable", "make", str(folder))
    assert result.returncode == 0, result.stderr
    return folder


def test_an_export_gives_the_same_pictures_with_the_core_alone(made):
    """TensorFlow, PyTorch, orbax and clu cannot be imported there; CI runs it in a fresh venv."""
    result = run("-m", "tests.portable", "check", str(made))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "pictures: " in result.stdout and "MiB resident" in result.stdout


@pytest.mark.slow
def test_the_check_of_portability_can_fail(made, tmp_path):
    shutil.copytree(made / "export", tmp_path / "export")
    with np.load(made / "pictures.npz") as file:
        arrays = dict(file)
    np.savez(tmp_path / "pictures.npz", **{**arrays, "samples": arrays["samples"] + 0.01})
    result = run("-m", "tests.portable", "check", str(tmp_path))
    assert result.returncode == 1 and "pictures differ by" in result.stderr


def test_the_core_environment_of_the_check_lacks_what_it_says():
    for name in portable.ABSENT:
        with pytest.raises(ImportError):
            portable.Refuse().find_spec(f"{name}.part")
    assert portable.Refuse().find_spec("numpy") is None


@pytest.mark.slow
def test_the_script_of_the_docs_runs():
    result = run("docs/pipeline.py")
    assert result.returncode == 0, result.stderr
    assert "model.safetensors" in result.stdout


def test_the_package_says_that_it_is_typed():
    assert (pathlib.Path(kaleido_jax.__file__).parent / "py.typed").is_file()


PUBLIC = [name for name in vars(Pipeline) if not name.startswith("_")]


@pytest.mark.parametrize("name", ["__init__", "__call__", *PUBLIC])
def test_public_methods_are_typed_and_documented(name):
    method = getattr(Pipeline, name)
    hints = typing.get_type_hints(method)
    parameters = [p for p in inspect.signature(method).parameters if p not in ("self", "cls")]
    assert set(parameters) <= set(hints)
    assert name == "__init__" or "return" in hints
    assert method.__doc__
    if parameters:
        assert "Raises" in method.__doc__ or "Arguments as" in method.__doc__


def test_threads_share_a_pipeline():
    """Four threads from the first call on, compilation included: everyone's own pictures."""
    assets = ROOT / "kaleido_jax" / "assets" / "shapes_kaleido"
    one = mesh.make_mesh(devices=jax.devices()[:1])
    pipe = Pipeline.from_pretrained(assets, one)
    settings = dict(num_steps=2, sampler="ddim", constrained=False)
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(pipe, "a red shape", 1, seed=seed, **settings) for seed in range(4)]
        together = [job.result() for job in jobs]
    fresh = Pipeline.from_pretrained(assets, one)
    for seed, out in enumerate(together):
        alone = fresh("a red shape", 1, seed=seed, **settings)
        assert [d.latents for d in out.documents] == [d.latents for d in alone.documents]
        np.testing.assert_array_equal(out.images, alone.images)
