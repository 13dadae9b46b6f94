"""Metrics on sets whose values are known, and the same in any blocks."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import scipy.linalg

from kaleido_jax.metrics import bootstrap, diversity, frechet, neighbours
from kaleido_jax.metrics.rows import Rows


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def brute(real: np.ndarray, fake: np.ndarray, k: int) -> dict[str, float]:
    """The definitions, with all distances at once."""

    def apart(a, b):
        return np.linalg.norm(a[:, None] - b[None], axis=2)

    def radius(x):
        return np.sort(apart(x, x), axis=1)[:, k]

    across = apart(real, fake)
    in_real, in_fake = across < radius(real)[:, None], across < radius(fake)[None]
    return {
        "precision": in_real.any(0).mean(),
        "density": in_real.sum(0).mean() / k,
        "recall": in_fake.any(1).mean(),
        "coverage": (across.min(1) < radius(real)).mean(),
    }


@pytest.mark.parametrize("size", [16, 33, 4096])
def test_neighbours_are_exact_in_any_blocks(size):
    real = normal(0, 90, 5) + 50  # far from the origin, where squares lose digits
    fake = 0.7 * normal(1, 61, 5) + 50.2
    real[7] = real[3]  # twins: their nearest other is at distance 0
    for k, found in neighbours.manifolds(real, fake, (1, 3, 5), size=size).items():
        for name, want in brute(real, fake, k).items():
            assert getattr(found, name).mean() == pytest.approx(want, abs=1e-12), (k, name)


def test_too_few_pictures_have_no_neighbours():
    with pytest.raises(ValueError, match="no 5 nearest"):
        neighbours.manifolds(normal(0, 5, 2), normal(1, 50, 2))


def test_frechet_distance_of_gaussians_and_of_few_rows():
    a, b = normal(0, 400, 6) @ normal(1, 6, 6), normal(2, 300, 6) @ normal(3, 6, 6) + 1
    one, two = frechet.moments(a), frechet.moments(b)
    root = scipy.linalg.sqrtm(one.covariance @ two.covariance).real
    shift = one.mean - two.mean
    want = shift @ shift + np.trace(one.covariance + two.covariance - 2 * root)
    assert frechet.frechet_distance(one, two) == pytest.approx(want, rel=1e-9)
    assert frechet.frechet_distance(one, one) == pytest.approx(0, abs=1e-9)
    # Fewer rows than dimensions: singular covariances, real values all the same. What is zero is
    # 1e-16 in float64, and its root 1e-8.
    few = frechet.moments(normal(4, 5, 40)), frechet.moments(normal(5, 7, 40))
    there, back = frechet.frechet_distance(*few), frechet.frechet_distance(*few[::-1])
    assert there > 0
    assert there == pytest.approx(back, rel=1e-7)


def test_rows_counted_twice_are_rows_that_stand_twice():
    rows = normal(0, 30, 4)
    counts = np.random.default_rng(1).integers(0, 3, 30)
    again = np.repeat(rows, counts, axis=0)
    one, two = frechet.moments(rows, counts), frechet.moments(again)
    assert np.allclose(one.covariance, two.covariance, atol=1e-14)
    assert one.count == two.count
    assert diversity.vendi_score(rows, counts) == pytest.approx(diversity.vendi_score(again))
    assert diversity.inception_score(rows, 1, counts) == pytest.approx(
        diversity.inception_score(again, 1)
    )


def test_scores_of_known_sets():
    # Five directions, each as often: five different pictures; one direction: one.
    assert diversity.vendi_score(np.repeat(np.eye(5), 8, axis=0)) == pytest.approx(5)
    assert diversity.vendi_score(np.ones((9, 3))) == pytest.approx(1)
    # Sure of one of four classes, all alike frequent, against sure of nothing.
    sure = np.tile(np.eye(4) * 60, (10, 1))
    assert diversity.inception_score(sure, 10) == pytest.approx(4)
    assert diversity.inception_score(np.zeros((40, 4)), 10) == pytest.approx(1)
    # Only the first half is sure of class 0: one class in its split, four in the other.
    halves = np.concatenate([np.tile(np.eye(4)[:1] * 60, (40, 1)), sure])
    assert diversity.inception_score(halves, 2) == pytest.approx((1 + 4) / 2)


def test_similarity_counts_pairs_of_one_caption():
    rows = np.array([[1, 0], [0, 2], [1, 1], [3, 0], [5, 5]])
    captions = ["a", "a", "b", "a", "c"]
    found, same, other = diversity.similarity_within(rows, captions)
    # Caption a: cosines 0, 1 and 0; b and c have no pair.
    assert np.allclose(found, [1 / 3]) and not len(same) and not len(other)


def test_similarity_is_split_by_latents():
    rows = np.array([[1, 0], [0, 2], [1, 1], [3, 0], [5, 5]])
    captions, root = ["a", "a", "a", "a", "b"], np.sqrt(0.5)
    found, same, other = diversity.similarity_within(rows, captions, ["y", "z", "z", "y", "z"])
    # y: rows 0 and 3, cosine 1; z: rows 1 and 2; the same z of another caption is no pair.
    assert np.allclose(same, [(1 + root) / 2])
    assert np.allclose(other, [(0 + root + 0 + root) / 4])
    assert np.allclose(found, [(1 + root + 2 * root) / 6])


def test_intervals_cover_and_are_seeded():
    values = normal(0, 400)
    mean, (low, high) = bootstrap.of_mean(values, 200, seed=1)
    assert low < mean < high
    assert high - low == pytest.approx(2 * 1.96 / np.sqrt(400), rel=0.25)
    assert bootstrap.of_mean(values, 200, seed=1) == (mean, (low, high))
    assert bootstrap.of_mean(values, 200, seed=2) != (mean, (low, high))
    value, (low, high) = bootstrap.of_statistic(
        lambda counts: diversity.vendi_score(values.reshape(100, 4), counts), 100, 50, 0
    )
    assert low < value < high
    assert value == diversity.vendi_score(values.reshape(100, 4))


def test_intervals_leave_out_resamples_without_a_value():
    nan, wanted = float("nan"), bootstrap.interval(0.0, [-1.0, 1.0])
    assert bootstrap.interval(0.0, [-1.0, nan, 1.0]) == wanted
    assert np.isnan(bootstrap.interval(0.0, [1.0, nan])).all()


def test_intervals_draw_together_what_is_not_independent():
    """400 values in runs of four alike say no more than the 100 that they are."""
    hundred = normal(0, 100)
    values, of = np.repeat(hundred, 4), np.repeat(np.arange(100), 4)
    mean, (low, high) = bootstrap.of_mean(values, 200, 1, of)
    assert mean == pytest.approx(hundred.mean())
    wanted = bootstrap.of_mean(hundred, 200, 1)[1]
    np.testing.assert_allclose((low, high), wanted)
    runs = bootstrap.of_statistic(lambda c: float(c @ values) / 400, 400, 200, 1, each=4)[1]
    np.testing.assert_allclose(runs, wanted)
    assert (high - low) > 1.5 * np.diff(bootstrap.of_mean(values, 200, 1)[1])[0]
    # Groups of one, whatever they are called, change nothing.
    assert bootstrap.of_mean(hundred, 50, 1, np.arange(100) * 7)[1] == pytest.approx(
        bootstrap.of_mean(hundred, 50, 1)[1]
    )
    # The last run may be short; groups of different sizes weigh by their size.
    assert all(len(c) == 10 and c[8] == c[9] for c in bootstrap.resamples(10, 5, 0, each=4))
    drawn = list(bootstrap.resamples(2, 50, 1))
    alone = bootstrap.of_mean(values, 20, 1, np.zeros(400, int))[1]
    assert np.isnan(alone).all()  # one caption does not say what others would give
    ragged = bootstrap.of_mean(np.array([0.0, 0.0, 3.0]), 50, 1, np.array([5, 5, 2]))
    means = [3 * c[0] / (c[0] + 2 * c[1]) for c in drawn]
    assert ragged == (1.0, bootstrap.interval(1.0, means))


def parts(folder, count: int) -> Rows:
    """`count` rows of 64 features in files of 500 rows."""
    paths = []
    for start in range(0, count, 500):
        paths.append(folder / f"{count}_{start}.npy")
        np.save(paths[-1], normal(start, 500, 64).astype(np.float32))
    return Rows(paths)


def test_memory_does_not_grow_with_the_number_of_pictures(tmp_path):
    """Ten times the rows: host memory for blocks stays, N x N is never made."""
    peaks = {}
    for count in (1000, 10_000):
        real, fake = parts(tmp_path, count), parts(tmp_path / "..", count)
        tracemalloc.start()
        frechet.moments(fake)
        diversity.vendi_score(fake)
        neighbours.manifolds(real, fake, (3,), size=1000)
        peaks[count] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peaks[10_000] < 2 * peaks[1000]
    assert peaks[10_000] < 10_000 * 10_000 * 4 / 10


def test_rows_of_files_are_those_of_one_array(tmp_path):
    rows = parts(tmp_path, 1500)
    whole = np.concatenate([block for _, block in rows.blocks(400)])
    assert whole.shape == (1500, 64)
    numbers = np.array([0, 499, 500, 501, 1499])
    assert np.array_equal(rows.take(numbers), whole[numbers])
    assert np.array_equal(next(rows.head(3).blocks())[1], whole[:3])
    assert len(rows.head(3)) == 3
