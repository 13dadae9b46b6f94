"""`kaleido bench data`: its figures and its records."""

from __future__ import annotations

import io
import json

import pytest
from PIL import Image

pytest.importorskip("array_record", reason="ArrayRecord needs the extra [data]")

from kaleido_jax import cli
from kaleido_jax.bench import data as bench
from kaleido_jax.data import RecordSource
from tests.records import write_shapes


def test_a_line_for_each_size(capsys):
    words = ["bench", "data", "--seconds", "0.2", "--records", "40", "--batch-size", "8"]
    assert cli.main([*words, "--size", "32", "--size", "48"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["size"] for line in lines] == [32, 48]
    for line in lines:
        assert line["records"] == 40
        assert line["images_per_second"] > 0
        assert line["images_per_cpu_second"] > 0
        assert set(line["resume_seconds"]) == {"10", "10000", "10000000"}
        # Any step costs the same; two seconds are the limit that the project sets itself.
        assert max(line["resume_seconds"].values()) < 2
        assert line["position_bytes"] < 1000


def test_the_records_of_a_task(capsys, tmp_path):
    write_shapes(tmp_path, 12)
    words = ["bench", "data", "--task", "shapes_64_mixture", "--data-dir", str(tmp_path)]
    assert cli.main([*words, "--seconds", "0.1", "--batch-size", "4"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert (line["data"], line["size"], line["records"]) == ("shapes_64_mixture", 64, 60)
    assert cli.main([*words, "--size", "64"]) == 2
    assert "a task has its own" in capsys.readouterr().err


@pytest.mark.parametrize(("size", "kilobytes"), [(64, 3.05), (256, 28)])
def test_drawn_pictures_weigh_what_photographs_do(size, kilobytes):
    for seed in (0, 1):
        data = bench.photograph(size, seed)
        assert len(data) == pytest.approx(1000 * kilobytes, rel=0.15)
        assert Image.open(io.BytesIO(data)).size == (size, size)
        assert data == bench.photograph(size, seed)


def test_drawn_records_are_records(tmp_path):
    bench.write_records(tmp_path, 32, 5)
    source = RecordSource(str(tmp_path), bench.LATENTS, 32)
    assert len(source) == 5
    for i in range(5):
        example = source[i]
        assert example["image"].shape == (32, 32, 3)
        assert all(example["latents"].values())
