"""The reference numbers of the repository, and any others that lie beside it."""

from __future__ import annotations

import filecmp
import os
import pathlib

import numpy as np
import pytest

from tests import parity

OWN = pathlib.Path(__file__).parent / "reference"
# The whole collection, where it is at hand; what it shares with ours is not run twice.
OTHERS = pathlib.Path(os.environ.get("KALEIDO_REFERENCE", OWN.parents[2] / "shared" / "reference"))


def others() -> list[pathlib.Path]:
    """Entries of the collection that differ from our copy."""
    if not OTHERS.is_dir():
        return []
    return [path for path in parity.entries(OTHERS) if not same(path, OWN / path.name)]


def same(left: pathlib.Path, right: pathlib.Path) -> bool:
    """Whether two files, or all files of two folders, are equal."""
    if not right.exists():
        return False
    if left.is_file():
        return filecmp.cmp(left, right, shallow=False)
    names = [p.relative_to(left) for p in left.rglob("*") if p.is_file()]
    return all(same(left / name, right / name) for name in names)


LONGEST = ("mdm_loss.npz", "mdm_sample.npz")  # together nearly a minute


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=[pytest.mark.slow] if path.name in LONGEST else [])
        for path in parity.entries(OWN)
    ],
    ids=lambda path: path.name,
)
def test_own_reference(path):
    holds, line = parity.report(path)
    if path.name == "mdm_nested2.npz" and not holds:
        # GroupNorm divides by the deviation of one or two numbers where features are 1x1 pixels:
        # float64 misses the stored pred_2 by 1.3e-3 (docs/design.md). Nothing else may miss.
        assert line.count(" FAILED") == 2 and "FAILED" in line.split("pred_2")[1]
        assert float(line.split("rel ")[-1].split()[0]) < 3e-3
        pytest.xfail(line)
    assert holds, line


@pytest.mark.skipif(not OTHERS.is_dir(), reason="no collection of reference files at hand")
def test_other_references():
    lines = [parity.report(path) for path in others()]
    assert all(holds for holds, _ in lines), "\n".join(line for _, line in lines)


def test_every_kind_of_network_is_among_our_references():
    kinds = {parity.format_of(path) for path in parity.entries(OWN)}
    assert {"mdm_unet", "mdm_nested", "mdm_loss", "t5_", "t5x_", "inception"} <= kinds


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("mdm_sampler_7.npz", "mdm_sampler"),
        ("mdm_sample.npz", "mdm_sample."),
        ("mdm_sample_b.npz", "mdm_sample_"),
        ("mdm_nested3.npz", "mdm_nested"),
        ("t5_v1_1.npz", "t5_"),
        ("solver.npz", "solver"),
        ("mdm_unet.txt", None),
        ("other.npz", None),
    ],
)
def test_the_longest_beginning_names_the_format(name, kind):
    assert parity.format_of(pathlib.Path(name)) == kind


def test_errors_are_relative_to_the_spread():
    want = np.array([10.0, 12.0])
    assert parity.errors([10.0, 12.5], want) == pytest.approx((0.5, 0.5))
    assert parity.errors(np.float32(4.4), np.float32(4.0)) == pytest.approx((0.4, 0.1))
    assert parity.errors(np.zeros(2), np.zeros(3)) == (np.inf, np.inf)
    assert parity.errors(np.array([np.nan, 1]), np.ones(2)) == (np.inf, np.inf)


def test_a_wrong_output_and_a_broken_file_fail(tmp_path, monkeypatch, capsys):
    want = np.arange(4.0)
    monkeypatch.setattr(parity, "compute", lambda path: {"x": (want * 1.001, want)})
    (tmp_path / "mdm_loss.npz").touch()
    assert parity.main([str(tmp_path)]) == 1
    assert "FAILED" in capsys.readouterr().out
    monkeypatch.setattr(parity, "compute", lambda path: {"x": (want, want)})
    assert parity.main([str(tmp_path)]) == 0
    monkeypatch.undo()
    assert parity.main([str(tmp_path)]) == 1


def test_a_wrong_network_fails_everywhere(tmp_path):
    with np.load(OWN / "mdm_nested2.npz") as archive:
        file = dict(archive)
    np.savez(tmp_path / "mdm_nested2.npz", **file | {"input/times": file["input/times"] + 1})
    holds, line = parity.report(tmp_path / "mdm_nested2.npz")
    assert not holds
    assert line.count(" FAILED") == 4  # the file and all three predictions


def test_a_folder_without_references_is_misuse(tmp_path, capsys):
    assert parity.main([str(tmp_path)]) == 2
    assert parity.main([str(tmp_path / "missing")]) == 2
    assert parity.main([]) == 2
    assert "usage" in capsys.readouterr().err
