"""`kaleido annotate fit-vokens`: codebooks of every kind, then used by `kaleido annotate`."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="k-means needs scikit-learn: install the extra 'annotate'")

from kaleido_jax import cli
from kaleido_jax.annotate import fit_vokens
from kaleido_jax.annotate.engines import make_engine
from kaleido_jax.annotate.protocols import Example
from kaleido_jax.data import ShapesSource
from kaleido_jax.errors import UserError
from kaleido_jax.latents import voken
from kaleido_jax.models.voken_tokenizer import PatchTokenizer
from tests.test_webdataset import encoded, write_shard


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for shard in range(3):
        source = ShapesSource(20, seed=shard, size=32 + 16 * shard)
        members = {}
        for number in range(20):
            example = source[number]
            members[f"{number:03d}.png"] = encoded(example["image"])
            members[f"{number:03d}.txt"] = example["caption"].encode()
        members["007.png"] = b"no picture"
        write_shard(folder / f"{shard:05d}.tar", members)
    return folder


def used(engine: str, num_codes: int) -> list[int]:
    """The ids that an engine gives to a picture."""
    made = make_engine("voken", engine)
    made.setup()
    image = ShapesSource(1, seed=9, size=64)[0]["image"]
    result = made.annotate([Example("k", image)], seed=0)[0]
    assert result.status == "ok", result
    ids = voken.parse(result.latent, num_codes)
    assert len(set(ids)) > 1
    return list(ids)


def test_patches_from_the_command_line(data, tmp_path, capsys):
    words = ["annotate", "fit-vokens", "--data", str(data), "--codes", "50", "--pictures", "40"]
    for name in ("a.npz", "b.npz"):
        assert cli.main([*words, "--out", str(tmp_path / name)]) == 0
    engine = capsys.readouterr().out.splitlines()[0].removeprefix("--engine.voken ")
    assert engine == f"patch:{tmp_path / 'a.npz'}"
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert PatchTokenizer.load(tmp_path / "a.npz").num_codes == 50
    used(engine, 50)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "b.npz"]


def test_fsq(data, tmp_path):
    used(fit_vokens.fit("fsq", str(data), tmp_path / "f.npz", 40), 8192)


@pytest.mark.slow
def test_features_of_a_model(data, tmp_path):
    pytest.importorskip("torch", reason="models need torch: install the extra 'annotate'")
    from tests import tiny_annotators as tiny

    model = tiny.backbone(tmp_path / "siglip")
    path = tmp_path / "k.npz"
    sizes = {"num_codes": 40, "side": 32, "components": 6}
    used(fit_vokens.fit(f"kmeans:{model}", str(data), path, 30, **sizes), 40)


def test_pictures_come_from_all_shards_and_bad_ones_are_passed_over(data):
    told: list[int] = []
    found = list(fit_vokens._pictures(str(data), "", 57, 0, told.append))
    assert {image.shape[0] for image in found} == {32, 48, 64}
    assert len(found) == 57 == told[-1]
    first = list(fit_vokens._pictures(str(data), "", 30, 0, told.append))
    again = list(fit_vokens._pictures(str(data), "", 30, 0, told.append))
    other = list(fit_vokens._pictures(str(data), "", 30, 1, told.append))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--kind pach", "no kind 'pach'"),
        ("--kind kmeans", "no kind 'kmeans'"),
        ("--kind patch:x", "no kind 'patch:x'"),
        ("--kind fsq --codes 9", "its levels say how many"),
        ("--codes 70000", "2 to 65536 can be"),
        ("--codes 8000 --pictures 2", "distinct patches cannot give 8000 codes"),
    ],
)
def test_misuse_says_what_would_be_right(data, tmp_path, capsys, words, expected):
    common = ["annotate", "fit-vokens", "--data", str(data), "--out", str(tmp_path / "v.npz")]
    assert cli.main([*common, *words.split()]) == 2
    assert expected in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["v.txt", "none/v.npz"])
def test_a_wrong_place_is_told_before_anything_is_read(data, tmp_path, name):
    with pytest.raises(UserError, match=r"end in \.npz|no folder"):
        fit_vokens.fit("patch", str(data), tmp_path / name, 10)
