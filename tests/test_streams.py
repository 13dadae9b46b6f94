"""Orders and mixtures: exact, stateless, the same for any hosts and restarts; quick decoding."""

from __future__ import annotations

import collections
import io
import itertools
import json
import pathlib
import tarfile

import numpy as np
import pytest
from PIL import Image

from kaleido_jax.data import Loader, ShapesSource
from kaleido_jax.data.streams import EpochStream, MixedStream, Mixture, make_stream
from kaleido_jax.data.transforms import ImageError, decode_image, decode_plain_jpeg
from kaleido_jax.errors import UserError
from kaleido_jax.tokens import Vocabulary

COCO = pathlib.Path(__file__).parents[2] / "shared" / "data" / "coco100" / "00000.tar"
VOCABULARY = Vocabulary.default()


class Named:
    """Records `NAME/NUMBER`."""

    def __init__(self, name: str, count: int):
        self.name, self.count = name, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return {
            "key": f"{self.name}/{index}",
            "image": np.full((8, 8, 3), index % 256, np.uint8),
            "caption": f"{index}",
            "latents": {"bbox": ""},
        }


def anew(source):
    """As many records under the same names, but other captions."""

    def other(named: Named) -> Named:
        class Other(Named):
            def __getitem__(self, index):
                return {**super().__getitem__(index), "caption": "another"}

        return Other(named.name, named.count)

    if isinstance(source, Mixture):
        parts = zip(source.names, source.sources, source.quotas, strict=True)
        parts = [(name, other(part), quota) for name, part, quota in parts]
        return Mixture({n: part for n, part, _ in parts}, {n: quota for n, _, quota in parts})
    return other(source)


def mixture(**rates) -> Mixture:
    counts = {"a": 30, "b": 7, "c": 101}
    return Mixture({name: Named(name, counts[name]) for name in rates}, rates)


def loader(source, batch_size=12, **more):
    settings = {"latents": ("bbox",), "caption_length": 8, "latent_length": 8, "image_size": 8}
    return Loader(source, VOCABULARY, batch_size=batch_size, **{**settings, **more})


def stream_of(source, positions, seed=0) -> list[int]:
    return make_stream(source, seed).indices(np.asarray(positions)).tolist()


# ---- mixtures ---------------------------------------------------------------------------------


def test_shares_are_exact_in_every_block():
    mixed = mixture(a=0.5, b=0.2, c=0.3)
    assert mixed.quotas == (35, 14, 21)  # 5 : 2 : 3, at least 64 together
    part, _ = MixedStream(mixed, 0).parts(np.arange(70 * 50))
    for block in part.reshape(50, 70):
        assert np.bincount(block).tolist() == [35, 14, 21]
    orders = {tuple(block) for block in part.reshape(50, 70)}
    assert len(orders) == 50  # each block is drawn anew


def test_each_source_is_read_in_its_own_order_without_a_gap():
    mixed = mixture(a=3, b=1)
    stream = MixedStream(mixed, 5)
    positions = np.arange(64 * 40)
    part, inner = stream.parts(positions)
    for number in (0, 1):
        assert inner[part == number].tolist() == list(range((part == number).sum()))
    # And so each source runs through whole epochs, each another permutation.
    read = stream.indices(positions)
    a = read[read < 30]
    epochs = a[: len(a) // 30 * 30].reshape(-1, 30)
    for epoch in epochs:
        assert sorted(epoch) == list(range(30))
    assert len({tuple(e) for e in epochs}) == len(epochs)
    b = read[read >= 30] - 30
    assert sorted(b[:7]) == sorted(b[7:14]) == list(range(7))


def test_any_position_alone_is_the_same():
    mixed = mixture(a=1, b=2, c=4)
    whole = stream_of(mixed, range(500))
    assert [stream_of(mixed, [p])[0] for p in range(0, 500, 13)] == whole[::13]
    far = stream_of(mixed, range(10**12, 10**12 + 100))
    assert stream_of(mixed, range(10**12 + 40, 10**12 + 60)) == far[40:60]
    assert stream_of(mixed, range(500), seed=1) != whole


def test_names_not_places_decide_the_order():
    """Another source beside it leaves a source's own order as it is."""
    alone = MixedStream(mixture(a=1, b=1), 0)
    more = MixedStream(mixture(b=1, c=3, a=1), 0)

    def order(stream, name):
        indices = stream.indices(np.arange(600))
        found = [stream.mixture[int(i)]["key"] for i in indices]
        return [key for key in found if key.startswith(name)][:60]

    assert order(alone, "a") == order(more, "a")


def test_mixtures_end_where_the_first_source_has_been_seen():
    for rates, epochs in (({"a": 1, "b": 1}, 1), ({"a": 3, "c": 7}, 2), ({"b": 5}, 3)):
        mixed = mixture(**rates)
        stream = MixedStream(mixed, 0)
        length = stream.length(epochs)
        part, inner = stream.parts(np.arange(length + 1))
        limits = epochs * np.array(mixed.counts)[part]
        assert (inner[:-1] < limits[:-1]).all()
        assert inner[-1] == limits[-1]  # the next one would begin another epoch


def test_the_loader_reads_a_mixture_on_any_number_of_hosts():
    mixed = mixture(a=0.2, b=0.1, c=0.7)
    whole = [loader(mixed).batch(step) for step in range(20)]
    for hosts in (2, 4):
        for step, batch in enumerate(whole):
            parts = [
                loader(mixed, host_index=h, host_count=hosts).batch(step).key_hash
                for h in range(hosts)
            ]
            np.testing.assert_array_equal(np.concatenate(parts), batch.key_hash)
    resumed = loader(mixed).batches(17)
    np.testing.assert_array_equal(next(resumed).key_hash, whole[17].key_hash)
    resumed.close()
    seen = [
        int(hash_)
        for batch, weights in loader(mixed, batch_size=8).evaluation_batches()
        for hash_, weight in zip(batch.key_hash, weights, strict=True)
        if weight
    ]
    assert len(set(seen)) == len(seen) == 138  # every example of every source once


def test_rates_that_cannot_be_are_told():
    for rates, words in (
        ({"a": 0, "b": 1}, "rate of a is 0; it must be positive"),
        ({"a": float("nan"), "b": 1}, "rate of a is nan"),
        ({"a": float("inf"), "b": 1}, "rate of a is inf"),
        ({"a": np.float32("inf"), "b": 1}, "rate of a is inf"),
        ({"a": "much", "b": 1}, "rate of a is much"),
        ({"a": 0, "b": 0}, "rate of a is 0"),
        ({"a": 0.123457, "b": 1}, "use rounder rates"),
    ):
        with pytest.raises(UserError, match=words):
            mixture(**rates)
    with pytest.raises(UserError, match="a rate for each source"):
        Mixture({"a": Named("a", 3)}, {"b": 1})
    with pytest.raises(UserError, match="b has no examples"):
        Mixture({"a": Named("a", 3), "b": Named("b", 0)}, {"a": 1, "b": 1})
    with pytest.raises(UserError, match="drop_remainder cannot apply"):
        loader(mixture(a=1, b=1), drop_remainder=True)
    with pytest.raises(IndexError):
        mixture(a=1)[30]


# ---- epochs -----------------------------------------------------------------------------------


def test_drop_remainder_gives_whole_batches_of_one_epoch():
    source = Named("n", 37)
    part = loader(source, 8, drop_remainder=True)
    assert part.steps_per_epoch == 4
    epochs = [np.concatenate([part.indices(4 * e + s) for s in range(4)]) for e in range(30)]
    for epoch in epochs:
        assert len(set(epoch)) == 32
    # Each epoch leaves out others.
    assert len({frozenset(range(37)) - frozenset(e.tolist()) for e in epochs}) > 20
    hosts = [loader(source, 8, drop_remainder=True, host_index=h, host_count=2) for h in (0, 1)]
    for step in range(9):
        both = np.concatenate([host.indices(step) for host in hosts])
        np.testing.assert_array_equal(both, part.indices(step))
    assert len(next(part.batches(10**7)).image) == 8
    with pytest.raises(UserError, match="less than a batch of 64"):
        loader(source, 64, drop_remainder=True)


def test_one_source_keeps_its_old_order():
    # Written down once: another order would break every resumed run.
    stream = EpochStream(8, 0)
    assert stream.indices(np.arange(8)).tolist() == [7, 1, 4, 0, 5, 2, 3, 6]
    assert MixedStream(mixture(a=1, b=1), 0).indices(np.arange(12)).tolist() == MIXED


MIXED = [4, 15, 20, 35, 25, 3, 33, 13, 36, 26, 34, 31]


# ---- positions --------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [Named("n", 37), mixture(a=1, b=3)])
def test_a_position_is_small_and_resumes_the_same_stream(source):
    going = loader(source, 6).batches()
    for _ in range(9):
        next(going)
    saved = json.dumps(loader(source, 6).position(9))
    assert len(saved) < 1000
    again = loader(source, 6)
    resumed = again.batches(again.resume(json.loads(saved)))
    for _ in range(4):
        np.testing.assert_array_equal(next(resumed).key_hash, next(going).key_hash)
    going.close()
    resumed.close()
    hosts = loader(source, 6, host_index=1, host_count=2)
    assert hosts.resume(json.loads(saved)) == 9
    for other, words in (
        (loader(source, 12), "batch_size was 6, now it is 12"),
        (loader(source, 6, seed=1), "seed was 0, now it is 1"),
        (loader(source, 6, shuffle=False), "shuffle was True"),
        (loader(Named("n", 38), 6), r"examples was \d+, now it is 38|mixture was"),
        (loader(anew(source), 6), "data was"),
    ):
        with pytest.raises(UserError, match=words):
            other.resume(json.loads(saved))
    earlier = {k: v for k, v in json.loads(saved).items() if k != "data"}
    assert loader(source, 6).resume(earlier) == 9


def test_a_position_holds_numbers_and_names_alone():
    """Whatever was read before: no record and no picture travels into a checkpoint."""
    part = loader(ShapesSource(64, size=32), 16, image_size=32, latent_length=80)
    before = part.position(4)
    for _ in itertools.islice(part.batches(), 4):
        pass
    assert part.position(4) == before
    assert all(isinstance(value, int | str) for value in before.values())


# ---- decoding ---------------------------------------------------------------------------------


def jpeg(pixels, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", **options)
    return buffer.getvalue()


PIXELS = ShapesSource(3, size=64)[1]["image"]


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_the_quick_decoder_gives_the_same_pixels(subsampling, progressive):
    noise = np.random.default_rng(0).integers(0, 256, (50, 67, 3), dtype=np.uint8)
    for pixels in (PIXELS, noise):
        height, width = pixels.shape[:2]
        for quality in (30, 75, 95):
            data = jpeg(pixels, quality=quality, subsampling=subsampling, progressive=progressive)
            quick = decode_plain_jpeg(data, width, height)
            np.testing.assert_array_equal(quick, decode_image(data)[0])


@pytest.mark.skipif(not COCO.exists(), reason="the photographs of coco100 are not here")
def test_the_quick_decoder_on_photographs():
    seen = collections.Counter()
    with tarfile.open(COCO) as tar:
        for member in tar:
            if not member.name.endswith(".jpg"):
                continue
            data = tar.extractfile(member).read()
            slow, _ = decode_image(data)
            quick = decode_plain_jpeg(data, slow.shape[1], slow.shape[0])
            seen[quick is not None] += 1
            if quick is not None:
                np.testing.assert_array_equal(quick, slow)
    assert seen[True] > 90


def test_the_quick_decoder_leaves_the_rest_to_the_careful_one():
    data = jpeg(PIXELS)
    assert decode_plain_jpeg(data, 64, 64) is not None
    for other in (
        data[:-300],  # truncated
        data[:100],
        b"",
        b"\xff\xd8\xff\xd9",
        data[:2] + b"\xff\xe0\x00\x00" + data[2:],
        jpeg(PIXELS[..., 0]),  # grey
    ):
        assert decode_plain_jpeg(other, 64, 64) is None
    assert decode_plain_jpeg(data, 64, 63) is None
    with pytest.raises(ImageError):
        decode_image(data[:-300])
