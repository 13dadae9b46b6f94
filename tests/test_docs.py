"""What the documents promise exists: functions of the design table, links, README's commands."""

from __future__ import annotations

import importlib
import pathlib
import re
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def table_functions() -> list[str]:
    """The names in the last column of the design table."""
    text = (ROOT / "docs" / "design.md").read_text("utf-8")
    table = text.partition("| source | what | function |")[2].partition("\n\n")[0]
    return [name for row in table.splitlines()[2:] for name in re.findall(r"`([\w.]+)`", row)]


def resolve(name: str) -> object:
    """The object that 'losses.latent_loss' names inside the package."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(["kaleido_jax", *parts[:cut]]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part)
        return found
    raise AttributeError(name)


def test_the_design_table_is_read():
    assert len(table_functions()) >= 25


@pytest.mark.parametrize("name", table_functions())
def test_functions_of_the_design_table_exist(name):
    assert resolve(name) is not None


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    links = re.findall(r"\]\(([^)#:]+)\)", path.read_text("utf-8"))
    missing = [link for link in links if not (path.parent / link).exists()]
    assert not missing


def test_named_files_exist():
    for path in DOCUMENTS:
        for name in re.findall(
            r"`((?:kaleido_jax|configs|docs|launch|tests)/[\w./]+)`", path.read_text("utf-8")
        ):
            assert (ROOT / name).exists() or "NAME" in name, f"{path.name}: {name}"


def test_configs_that_the_readme_trains_exist():
    from kaleido_jax.config import load_config

    names = re.findall(r"kaleido train --config (\w+)", (ROOT / "README.md").read_text("utf-8"))
    assert len(names) >= 3
    for name in names:
        load_config(name)


def test_readme_has_two_whole_commands():
    lines = [
        line for line in (ROOT / "README.md").read_text("utf-8").splitlines() if "-m venv" in line
    ]
    assert len(lines) == 2
    for line in lines:
        assert "-c constraints.txt" in line
        subprocess.run(["bash", "-n", "-c", line], check=True)
    assert lines[0].endswith("kaleido demo")
    assert "-m pytest" in lines[1]


def test_the_ci_script_is_whole_and_executable():
    path = ROOT / ".ci" / "run"
    assert path.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_launch_without_arguments_says_how(tmp_path):
    result = subprocess.run(
        [str(ROOT / "launch" / "compare.sh")], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert "launch/compare.sh CONFIG FOLDER" in result.stderr


def test_launch_trains_both_and_reports_a_failure(tmp_path):
    fake = tmp_path / "kaleido"
    fake.write_text('#!/bin/sh\necho "$@"\ncase "$*" in *"latents=()"*) exit 1;; esac\n', "utf-8")
    fake.chmod(0o755)
    result = subprocess.run(
        [str(ROOT / "launch" / "compare.sh"), "shapes", str(tmp_path / "run"), "--config.seed=1"],
        env={"PATH": "/usr/bin:/bin", "KALEIDO": str(fake)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 1
    assert "baseline failed" in result.stderr
    first = (tmp_path / "run" / "kaleido.log").read_text("utf-8").strip()
    second = (tmp_path / "run" / "baseline.log").read_text("utf-8").strip()
    assert first == f"train --config shapes --workdir {tmp_path}/run/kaleido --config.seed=1"
    assert second == (
        f"train --config shapes --workdir {tmp_path}/run/baseline --config.seed=1 "
        "--config.latents=()"
    )
