"""Compiled programs on disk: where, when not, and that they give the same pictures."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

from kaleido_jax import compiled

ROOT = pathlib.Path(__file__).parent.parent
MODEL = ROOT / "kaleido_jax" / "assets" / "shapes_kaleido"


def run(*words: str, **environment: str) -> subprocess.CompletedProcess:
    own = {name: value for name, value in os.environ.items() if "CACHE" not in name}
    return subprocess.run(
        [sys.executable, *words],
        cwd=ROOT, env={**own, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **environment},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def test_the_default_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("KALEIDO_CACHE", str(tmp_path))
    assert compiled.default_folder() == tmp_path
    monkeypatch.delenv("KALEIDO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compiled.default_folder() == tmp_path / "kaleido_jax" / "compiled"
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    assert compiled.default_folder() == pathlib.Path.home() / ".cache" / "kaleido_jax" / "compiled"


def test_another_processor_has_another_folder(monkeypatch):
    here = compiled.machine()
    assert here == compiled.machine()
    read = pathlib.Path.read_text
    monkeypatch.setattr(
        pathlib.Path, "read_text", lambda self, *given: read(self, *given) + "\nflags : other\n"
    )
    assert compiled.machine() != here


def test_programs_are_kept_and_a_bad_folder_is_no_harm(tmp_path):
    code = (
        "import sys, jax, jax.numpy as jnp; from kaleido_jax import compiled; "
        "print(compiled.keep(sys.argv[1])); jax.config.update("
        "'jax_persistent_cache_min_compile_time_secs', 0); jax.jit(jnp.sin)(1.0)"
    )
    (tmp_path / "file").write_text("in the way")
    for folder, there in ((tmp_path / "cache", True), (tmp_path / "file", False)):
        result = run("-c", code, str(folder))
        assert result.returncode == 0, result.stderr
        expected = folder / compiled.machine() if there else None
        assert result.stdout.strip() == str(expected)
    assert any((tmp_path / "cache").rglob("jit_*"))


@pytest.mark.slow
def test_a_second_start_compiles_nothing_and_gives_the_same_pictures(tmp_path):
    words = ["-m", "kaleido_jax.cli", "sample", "--checkpoint", str(MODEL), "--num", "3"]
    words += ["--prompt", "dawn: a red shape", "--steps", "5", "--out"]
    cache, pictures = tmp_path / "cache", {}
    for name, extra in (
        ("first", ["--cache", str(cache)]),
        ("second", ["--cache", str(cache)]),
        ("without", ["--no-cache"]),
    ):
        before = {path.name for path in cache.rglob("jit_*-cache")}
        result = run(*words, str(tmp_path / name), *extra, XLA_FLAGS="")
        assert result.returncode == 0, result.stderr
        made = {path.name for path in cache.rglob("jit_*-cache")} - before
        assert bool(made) == (name == "first")
        pictures[name] = [(tmp_path / name / f"00000{i}.png").read_bytes() for i in range(3)]
    assert pictures["first"] == pictures["second"] == pictures["without"]
