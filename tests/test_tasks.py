"""seqio tasks and mixtures: what seqio's users expect of them, and the loader's stream."""

from __future__ import annotations

import collections
import itertools
import subprocess
import sys

import numpy as np
import pytest

seqio = pytest.importorskip("seqio", reason="tasks need the extra [data]")
pytest.importorskip("array_record", reason="ArrayRecord needs the extra [data]")

import tensorflow as tf  # noqa: E402

from kaleido_jax.data import Loader, feature_converter, make_source, task_table, tasks  # noqa: E402
from kaleido_jax.data.reader import key_hash  # noqa: E402
from kaleido_jax.data.seqio_vocabulary import SeqioVocabulary  # noqa: E402
from kaleido_jax.errors import UserError  # noqa: E402
from kaleido_jax.tokens import EOS, UNK, Vocabulary  # noqa: E402
from tests import t5_pieces  # noqa: E402
from tests.records import jpeg, record, write_folder, write_shapes  # noqa: E402

COUNT = 23
VOCABULARY = Vocabulary.default(task_table.NUM_VOKENS)
LENGTHS = {"caption": 32, "latents": 200, "image": 64, "key_hash": 1}
FIELDS = ("caption_tokens", "latent_tokens", "image", "key_hash")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_shapes(root, COUNT)
    write_shapes(root, 9, "coco100")
    tasks.register(data_dir=str(root))
    yield str(root)
    tasks.register()


def loader(name, data_dir, batch_size=5, lengths=LENGTHS, **more):
    spec = task_table.find(name)
    source = make_source({"name": "task", "task": name, "path": data_dir}, 64, spec.latents)
    return Loader(
        source,
        VOCABULARY,
        latents=spec.latents,
        caption_length=lengths["caption"],
        latent_length=lengths["latents"],
        image_size=64,
        batch_size=batch_size,
        **more,
    )


def assert_same(a, b):
    for field in FIELDS:
        x, y = getattr(a, field), getattr(b, field)
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y, err_msg=field)


def keys(ds) -> list[str]:
    return [example["key"].decode() for example in ds.as_numpy_iterator()]


# ---- as seqio's users expect ------------------------------------------------------------------


def test_every_data_set_has_its_tasks():
    for data in ("cc12m_64", "cc12m_256", "imagenet_256", "cifar10_32", "coco100_64"):
        for latent in task_table.LATENT_SETS:
            task = seqio.get_mixture_or_task(f"{data}_{latent}")
            assert isinstance(task, seqio.Task)
            assert task.source.caching_permitted is False
        assert isinstance(seqio.get_mixture_or_task(f"{data}_mixture"), seqio.Mixture)
    spec = task_table.find("cc12m_256_combined")
    assert (spec.latents, spec.latent_length, spec.size) == (("text", "bbox", "voken"), 288, 256)
    assert tasks.feature_lengths("cc12m_256_text")["latents"] == 128


def test_a_task_gives_its_features(data_dir):
    task = seqio.get_mixture_or_task("shapes_64_combined")
    assert task.splits == ("train",)
    assert task.num_input_examples("train") == COUNT
    assert len(task.source.list_shards("train")) == 3
    examples = list(task.get_dataset(None, shuffle=False).as_numpy_iterator())
    assert [e["key"].decode() for e in examples] == [f"shapes-3-{i}" for i in range(COUNT)]
    source = task_table.task_source("shapes_64_combined", data_dir)
    vocabulary = task.output_features["latents"].vocabulary
    for index, example in enumerate(examples):
        truth = source[index]
        np.testing.assert_array_equal(example["image"], truth["image"])
        assert vocabulary.decode(example["caption"].tolist()) == truth["caption"]
        names = ("text", "bbox", "voken")
        back = VOCABULARY.decode_latents(example["latents"], names)
        assert back == {name: truth["latents"][name] for name in names}
        assert example["latents"][-1] == example["caption"][-1] == EOS
        assert example["key_hash"] == key_hash(truth["key"])


def test_shuffling_epochs_and_shards(data_dir):
    task = seqio.get_mixture_or_task("shapes_64_bbox")
    everything = {f"shapes-3-{i}" for i in range(COUNT)}
    two = keys(task.get_dataset(LENGTHS, shuffle=True, seed=1, num_epochs=2))
    assert len(two) == 2 * COUNT
    assert set(two[:COUNT]) == set(two[COUNT:]) == everything
    assert two[:COUNT] != two[COUNT:]  # each epoch another order
    assert keys(task.get_dataset(LENGTHS, seed=1)) == two[:COUNT]
    assert keys(task.get_dataset(LENGTHS, seed=2)) != two[:COUNT]
    shards = [
        keys(task.get_dataset(LENGTHS, seed=1, num_epochs=2, shard_info=seqio.ShardInfo(i, 4)))
        for i in range(4)
    ]
    woven = [key for row in itertools.zip_longest(*shards) for key in row if key is not None]
    assert woven == two
    endless = task.get_dataset(LENGTHS, seed=1, num_epochs=None).take(60)
    assert keys(endless)[: 2 * COUNT] == two
    source = list(task.source.get_dataset("train", False, num_epochs=2).as_numpy_iterator())
    assert [r["index"] for r in source] == [*range(COUNT)] * 2
    assert [r["key"].decode() for r in source[:COUNT]] == [f"shapes-3-{i}" for i in range(COUNT)]


def test_lengths_cut_at_segment_ends(data_dir):
    task = seqio.get_mixture_or_task("shapes_64_bbox")
    whole = {e["key"]: e["latents"] for e in task.get_dataset(None).as_numpy_iterator()}
    cut = 0
    for example in task.get_dataset({**LENGTHS, "latents": 40}).as_numpy_iterator():
        ids = example["latents"]
        assert len(ids) <= 40
        assert ids[-1] == EOS
        if len(ids) < len(whole[example["key"]]):
            cut += 1
            np.testing.assert_array_equal(ids[:-1], whole[example["key"]][: len(ids) - 1])
            assert VOCABULARY.decode(ids).endswith(")") or len(ids) == 1
    assert cut
    with pytest.raises(UserError, match="pictures of 32 pixels, the records have 64"):
        task.get_dataset({**LENGTHS, "image": 32})


def test_lengths_without_trimming_cut_nothing(data_dir):
    for name in ("shapes_64_bbox", "shapes_64_mixture"):
        task = seqio.get_mixture_or_task(name)
        lengths = {**LENGTHS, "caption": 3, "latents": 9}
        whole = task.get_dataset(None, num_epochs=1)
        for other, same in (
            (task.get_dataset(lengths, num_epochs=1, trim_output_features=False), True),
            (task.get_dataset(lengths, num_epochs=1), False),
        ):
            pairs = zip(whole.as_numpy_iterator(), other.as_numpy_iterator(), strict=True)
            assert all(
                np.array_equal(a[f], b[f]) == same for a, b in pairs for f in ("caption", "latents")
            )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "test"}, "no split 'test'"),
        ({"seed": "x"}, "seed is 'x'"),
        ({"start": -1}, "start is -1"),
        ({"num_epochs": 0}, "num_epochs is 0"),
        ({"shard_info": seqio.ShardInfo(4, 4)}, "shard 4 of 4"),
        ({"shard_info": seqio.ShardInfo(0, 0)}, "shard 0 of 0"),
        ({"sequence_length": {"caption": 0}}, "at least 1"),
    ],
)
def test_arguments_out_of_range_are_told(data_dir, settings, message):
    for name in ("shapes_64_bbox", "shapes_64_mixture"):
        with pytest.raises(UserError, match=message):
            seqio.get_mixture_or_task(name).get_dataset(**settings)


def test_batches_that_cannot_be_shared_are_told(data_dir):
    for rows, host, hosts, message in (
        (9, 0, 2, "cannot be split over 2 hosts"),
        (0, 0, 1, "batch size 0"),
        (8, 2, 2, "host index 2 is not in 0..1"),
    ):
        with pytest.raises(UserError, match=message):
            tasks.batches("shapes_64_text", rows, host_index=host, host_count=hosts)
    with pytest.raises(UserError, match="no split 'test'"):
        seqio.get_mixture_or_task("shapes_64_text").num_input_examples("test")


def test_seqio_get_dataset_and_the_converter(data_dir):
    ds = seqio.get_dataset(
        "shapes_64_combined",
        task_feature_lengths=LENGTHS,
        feature_converter=feature_converter.KaleidoFeatureConverter(),
        shuffle=True,
        seed=0,
        num_epochs=None,
        batch_size=5,
    )
    got = [feature_converter.to_batch(b) for b in ds.take(6).as_numpy_iterator()]
    mine = loader("shapes_64_combined", data_dir)
    for step, batch in enumerate(got):
        assert_same(batch, mine.batch(step))


def test_the_vocabulary_of_seqio():
    ids = SeqioVocabulary(VOCABULARY)
    assert (ids.vocab_size, ids.eos_id, ids.unk_id, ids.pad_id) == (VOCABULARY.size, EOS, UNK, 0)
    text = "dawn: a red shape"
    assert ids.encode_tf(tf.constant(text)).numpy().tolist() == ids.encode(text)
    assert ids.decode([*ids.encode(text), EOS, 5]) == text
    rows = tf.constant([[*ids.encode(text), EOS, 7]])
    assert ids.decode_tf(rows).numpy().tolist() == [text.encode()]
    # Text reaches neither vokens nor sections, ids of vokens are read.
    assert max(ids.encode("#17 </s>")) < VOCABULARY.section_offset
    assert ids.decode([VOCABULARY.voken_offset + 17]) == "#17"
    assert ids == SeqioVocabulary(Vocabulary.default(task_table.NUM_VOKENS))
    assert ids != SeqioVocabulary(Vocabulary.default(5))


@t5_pieces.needs_table
def test_t5_pieces_as_a_vocabulary_of_seqio():
    ids = SeqioVocabulary(t5_pieces.vocabulary())
    assert ids.vocab_size == 40320
    assert ids.decode([32128, 40319]) == "#0#8191"
    assert ids.tokens.section_id("text") == 32100


# ---- the same stream as the loader's ----------------------------------------------------------


@pytest.mark.parametrize("name", ["shapes_64_combined", "shapes_64_mixture"])
def test_both_streams_are_equal_on_any_number_of_hosts(data_dir, name):
    mine = loader(name, data_dir, batch_size=8)
    whole = [mine.batch(step) for step in range(7)]  # more than two epochs
    for hosts in (1, 2, 4):
        parts = [
            list(
                itertools.islice(
                    tasks.batches(name, 8, lengths=LENGTHS, host_index=host, host_count=hosts),
                    7,
                )
            )
            for host in range(hosts)
        ]
        for step, batch in enumerate(whole):
            for field in FIELDS:
                # Host h takes every hosts-th example of the one order.
                woven = np.stack([getattr(p[step], field) for p in parts], axis=1)
                want = getattr(batch, field)
                np.testing.assert_array_equal(woven.reshape(want.shape), want)


def test_both_streams_resume_anywhere(data_dir):
    for name in ("shapes_64_blob", "shapes_64_mixture"):
        mine = loader(name, data_dir)
        for start in (3, 10**7):
            batches = tasks.batches(name, 5, lengths=LENGTHS, start=start)
            for step in range(start, start + 3):
                assert_same(next(batches), mine.batch(step))


def truncated(made):
    made[4]["image"] = [made[4]["image"][0][:200]]
    made[7]["voken"] = [b"#1#2"]


def unreadable(made):
    del made[2]["caption"]
    made[5]["key"] = [b"\xff"]
    # Whoever reads vokens need not mind.
    made[9]["text"] = [b"\xff"]
    made[11]["blob"] = [b"", b""]


@pytest.mark.parametrize("spoil", [truncated, unreadable])
def test_bad_records_find_the_same_stand_ins(data_dir, tmp_path, spoil):
    image = jpeg(np.full((64, 64, 3), 90, np.uint8))
    made = [record(f"k{i}", image, 64, f"picture {i}") for i in range(40)]
    spoil(made)
    write_folder(tmp_path / "shapes" / "64" / "1.0.0", made, name="shapes")
    tasks.register(data_dir=str(tmp_path))
    try:
        mine = loader("shapes_64_voken", str(tmp_path), 20)
        theirs = tasks.batches("shapes_64_voken", 20, lengths=LENGTHS, num_epochs=1)
        for step, batch in enumerate(theirs):
            assert_same(batch, mine.batch(step))
        assert len(mine.bad) == 2
    finally:
        tasks.register(data_dir=data_dir)


# ---- mixtures ---------------------------------------------------------------------------------


def test_a_mixture_is_exact_and_tells_what_z_holds(data_dir):
    spec = task_table.find("shapes_64_mixture")
    assert spec.latents == ("text", "bbox", "blob", "voken")
    mixture = seqio.get_mixture_or_task("shapes_64_mixture")
    examples = mixture.get_dataset(LENGTHS, seed=0, num_epochs=None)
    sections = {VOCABULARY.section_id(n): n for n in spec.latents}
    seen = collections.Counter()
    for example in examples.take(70 * 2).as_numpy_iterator():
        assert set(example) == set(mixture.output_features)
        seen[tuple(sections[i] for i in example["latents"] if i in sections)] += 1
    assert seen == {
        ("text",): 20,
        ("bbox",): 20,
        ("blob",): 20,
        ("voken",): 20,
        ("text", "bbox", "voken"): 60,
    }
    finite = mixture.get_dataset(LENGTHS, seed=0, num_epochs=1, passthrough_features=["key"])
    # It ends where the most frequent of its tasks has been seen once.
    assert COUNT * 7 / 3 - 10 < len(keys(finite)) < COUNT * 7 / 3 + 20


def test_misuse_is_told(data_dir, tmp_path):
    with pytest.raises(UserError, match="nearest is 'cc12m_256_combined'"):
        task_table.find("cc12m_256_combind")
    with pytest.raises(UserError, match="already"):
        task_table.add_task("cc12m_256_text", "x", 256, ("text",), 9)
    with pytest.raises(UserError, match="no latent 'depth'"):
        task_table.add_task("new", "x", 256, ("depth",), 9)
    with pytest.raises(UserError, match="different sizes"):
        task_table.add_mixture("new", {"cc12m_256_text": 1, "cc12m_64_text": 1})
    with pytest.raises(UserError, match="the rate of cc12m_64_text is 0; it must be positive"):
        task_table.add_mixture("new", {"cc12m_64_text": 0, "cc12m_64_bbox": 0})
    with pytest.raises(UserError, match="tasks only"):
        task_table.add_mixture("new", {"cc12m_256_mixture": 1})
    settings = {"name": "task", "task": "shapes_64_text", "path": data_dir}
    with pytest.raises(UserError, match=r"has the latents \('text',\)"):
        make_source(settings, 64, ("bbox",))
    with pytest.raises(UserError, match="pictures of 64 pixels"):
        make_source(settings, 32, ("text",))
    with pytest.raises(UserError, match="no such folder of records"):
        make_source({**settings, "path": str(tmp_path)}, 64, ("text",))
    assert len(make_source(settings, 64)) == COUNT  # the baseline reads any task


def test_the_loader_of_tasks_needs_no_tensorflow(data_dir):
    code = (
        "import sys; from kaleido_jax.data import make_source; "
        f"s = make_source({{'name': 'task', 'task': 'shapes_64_mixture', 'path': {data_dir!r}}});"
        "s[0]; assert not {'tensorflow', 'seqio', 'tensorflow_datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_the_process_ends_while_a_data_set_is_read(data_dir):
    """An endless data set is alive when the interpreter exits; it must not hold it up."""
    code = (
        "from kaleido_jax.data import tasks; "
        f"tasks.register(data_dir={data_dir!r}); "
        "batches = tasks.batches('shapes_64_text', 8); next(batches); print('read')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout == "read\n"
