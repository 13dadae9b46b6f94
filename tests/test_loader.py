"""The loader: one stream of examples for any hosts, batch split and restart."""

from __future__ import annotations

import itertools
import threading

import numpy as np
import pytest

from kaleido_jax.data import Loader, RecordError, ShapesSource, ToySource
from kaleido_jax.data.loader import key_hash, permute
from kaleido_jax.errors import UserError
from kaleido_jax.tokens import EOS, Vocabulary

VOCABULARY = Vocabulary.default()
SETTINGS = {"latents": ("bbox",), "caption_length": 16, "latent_length": 80, "image_size": 32}
ORDER = [7, 1, 4, 0, 5, 2, 3, 6]


class Numbers:
    """Tiny records whose number is their key; some cannot be read."""

    def __init__(self, count: int, bad: tuple[int, ...] = ()):
        self.count, self.bad = count, bad

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index in self.bad:
            raise RecordError(f"shard: {index}", "broken")
        image = np.full((32, 32, 3), index % 256, np.uint8)
        return {"key": str(index), "image": image, "caption": str(index), "latents": {"bbox": ""}}


def loader(source, batch_size=8, **more):
    return Loader(source, VOCABULARY, batch_size=batch_size, **{**SETTINGS, **more})


def numbers(batch) -> list[int]:
    return [int(VOCABULARY.decode(row)) for row in batch.caption_tokens]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64, 1000, 4097])
def test_every_epoch_is_a_permutation(count):
    everything = np.arange(count)
    orders = [permute(everything, count, seed, e) for seed, e in ((0, 0), (0, 1), (1, 0))]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), everything)
    # Any entry alone is the same.
    assert [int(permute(np.array([i]), count, 0, 0)[0]) for i in range(min(count, 20))] == orders[
        0
    ].tolist()[:20]
    if count >= 64:
        assert not np.array_equal(orders[0], orders[1])
        assert not np.array_equal(orders[0], orders[2])


def test_the_order_looks_random():
    count = 5000
    order = permute(np.arange(count), count, 0, 0)
    assert abs(np.corrcoef(order, np.arange(count))[0, 1]) < 0.05
    assert np.mean(np.abs(np.diff(order)) == 1) < 0.01
    # Entry 0 lands anywhere: spread over many epochs.
    firsts = np.array([permute(np.array([0]), count, 0, e)[0] for e in range(400)])
    assert abs(firsts.mean() / count - 0.5) < 0.08
    assert len(np.unique(firsts)) > 350


def test_a_batch_has_the_shapes_of_the_contract():
    batch = loader(ShapesSource(size=32), 4).batch(3)
    assert batch.caption_tokens.shape == (4, 16)
    assert batch.latent_tokens.shape == (4, 80)
    assert batch.image.shape == (4, 32, 32, 3)
    assert (batch.caption_tokens.dtype, batch.latent_tokens.dtype) == (np.int32, np.int32)
    assert (batch.image.dtype, batch.key_hash.dtype) == (np.uint8, np.uint32)
    assert np.all((batch.latent_tokens == EOS).sum(1) == 1)


def test_no_latents_and_points():
    batch = loader(ToySource(), 4, latents=(), latent_length=80).batch(0)
    assert batch.latent_tokens.shape == (4, 0)
    assert batch.image.shape == (4, 1, 1, 2)
    assert batch.image.dtype == np.float32


def test_one_stream_for_any_batch_split_and_hosts():
    source = Numbers(37)
    stream = list(itertools.chain(*(numbers(loader(source, 4).batch(s)) for s in range(30))))
    wide = list(itertools.chain(*(numbers(loader(source, 12).batch(s)) for s in range(10))))
    assert wide == stream
    split = []
    for step in range(10):
        for host in range(3):
            part = loader(source, 12, host_index=host, host_count=3)
            split += numbers(part.batch(step))
    assert split == stream
    # Each epoch holds every example once, and none is lost where a batch crosses its end.
    for epoch in range(3):
        assert sorted(stream[37 * epoch : 37 * (epoch + 1)]) == list(range(37))


def test_resuming_equals_going_on():
    source = ShapesSource(size=32, num_objects=(1, 2))
    going = loader(source, 4, workers=2).batches()
    for _ in range(5):
        next(going)
    resumed = loader(source, 4).batches(5)
    for _ in range(3):
        a, b = next(going), next(resumed)
        for field in ("caption_tokens", "latent_tokens", "image", "key_hash"):
            np.testing.assert_array_equal(getattr(a, field), getattr(b, field))
    going.close()
    resumed.close()
    far = loader(source, 4).batch(10**9)
    assert far.image.shape == (4, 32, 32, 3)


def test_evaluation_sees_each_example_once():
    part = [loader(Numbers(10), 4, host_index=h, host_count=2) for h in (0, 1)]
    seen = []
    for each in part:
        for batch, weights in each.evaluation_batches():
            assert len(weights) == len(batch.image) == 2
            seen += [n for n, w in zip(numbers(batch), weights, strict=True) if w]
    assert sorted(seen) == list(range(10))


def test_bad_records_are_counted_and_replaced():
    bad = loader(Numbers(200, bad=(3, 150)), 8, max_bad_fraction=0.02)
    stream = list(itertools.chain(*(numbers(bad.batch(s)) for s in range(25))))
    assert bad.bad == {"shard: 3": "broken", "shard: 150": "broken"}
    assert len(stream) == 200
    # Two others stand in, each the same whenever it is read.
    assert len(set(stream)) == 198
    again = loader(Numbers(200, bad=(3, 150)), 8)
    assert list(itertools.chain(*(numbers(again.batch(s)) for s in range(25)))) == stream
    weights = np.concatenate([w for _, w in again.evaluation_batches()])
    assert weights.sum() == 198
    spoiled = loader(Numbers(200, bad=tuple(range(0, 200, 5))), 200)
    with pytest.raises(UserError, match=r"more than the share of 0\.02.*shard: .*broken"):
        spoiled.batch(0)


def test_evaluation_bears_bad_records_that_lie_side_by_side():
    # Of a missing file, for example: its share of the whole counts, not of what was read so far.
    first = loader(Numbers(1000, bad=tuple(range(15))), 8)
    weights = np.concatenate([w for _, w in first.evaluation_batches()])
    assert weights.tolist() == [0] * 15 + [1] * 985
    assert len(first.bad) == 15
    in_order = loader(Numbers(1000, bad=tuple(range(15))), 40, shuffle=False)
    assert numbers(in_order.batch(0))[15:] == list(range(15, 40))
    with pytest.raises(UserError, match=r"21 of 21 records .* share of 0\.02"):
        list(loader(Numbers(1000, bad=tuple(range(30))), 8).evaluation_batches())


def test_evaluation_counts_a_bad_record_once():
    # The last one of all, and so beside the places that fill the last batch.
    for hosts in (1, 2):
        kept = []
        for host in range(hosts):
            part = loader(
                Numbers(65, bad=(64,)), 16, host_index=host, host_count=hosts, max_bad_fraction=0.02
            )
            for batch, weights in part.evaluation_batches():
                assert len(batch.image) == len(weights) == 16 // hosts
                kept += [n for n, w in zip(numbers(batch), weights, strict=True) if w]
        assert sorted(kept) == list(range(64))


def test_chance_does_not_stop_a_bearable_share():
    draw = np.random.default_rng(0)
    for seed in range(40):
        bad = tuple(draw.choice(5000, 90, replace=False).tolist())  # 1.8%
        part = loader(Numbers(5000, bad=bad), 100, seed=seed)
        for step in range(0, 5000 // 100, 3):
            part.batch(step)
    none = loader(Numbers(500, bad=(3,)), 250, max_bad_fraction=0)
    with pytest.raises(UserError, match="could not be read"):
        none.batch(0), none.batch(1)


def test_a_latent_that_cannot_be_encoded_is_named_by_its_key():
    class Broken(Numbers):
        def __getitem__(self, index):
            made = super().__getitem__(index)
            return {**made, "latents": {"bbox": "no box \N{SNOWMAN}" if index == 3 else ""}}

    part = loader(Broken(60), 60)
    assert 3 not in numbers(part.batch(0))
    assert list(part.bad) == ["3"]


def test_threads_work_and_end_with_the_batches():
    def mine() -> list[threading.Thread]:
        return [t for t in threading.enumerate() if t.name.startswith("kaleido-loader")]

    class Meeting(Numbers):
        def __getitem__(self, index):
            meet.wait(10)  # passes when all six threads read at once
            return super().__getitem__(index)

    meet = threading.Barrier(6)
    batches = loader(Meeting(64), 1, prefetch=1, workers=6).batches()
    next(batches)
    assert len(mine()) == 6
    batches.close()
    assert not mine()


def test_errors_of_threads_reach_the_reader():
    source = Numbers(50, bad=tuple(range(50)))
    with pytest.raises(UserError, match="50 records in a row cannot be read"):
        next(loader(source, 8).batches())


def test_hashes_and_orders_never_change():
    # Written down once: another order would break every resumed run.
    assert key_hash("shapes-0-0") == 3733437488
    assert permute(np.arange(8), 8, 0, 0).tolist() == ORDER
    hashes = {key_hash(str(i)) for i in range(5000)}
    assert len(hashes) > 4990


def test_misuse_is_told():
    with pytest.raises(UserError, match="no examples"):
        loader(Numbers(0))
    with pytest.raises(UserError, match="cannot be split over 3 hosts"):
        loader(Numbers(9), 8, host_count=3)
    with pytest.raises(UserError, match=r"max_bad_fraction is 2; it must be in 0\.\.1"):
        loader(Numbers(9), 8, max_bad_fraction=2)
    with pytest.raises(UserError, match="max_bad_fraction is 'few'"):
        loader(Numbers(9), 8, max_bad_fraction="few")
    with pytest.raises(UserError, match="host index 2"):
        loader(Numbers(9), 8, host_index=2, host_count=2)
    with pytest.raises(UserError, match="image_size is 64"):
        loader(Numbers(9), 8, image_size=64).batch(0)
    with pytest.raises(UserError, match="no section token"):
        loader(Numbers(9), 8, latents=("depth",))
    with pytest.raises(UserError, match="at least 1"):
        loader(Numbers(9), 8, latent_length=0)
