"""seqio tasks and mixtures over records: importing this module registers the table of tasks.

    from kaleido_jax.data import tasks
    ds = seqio.get_mixture_or_task("cc12m_256_combined").get_dataset(
        sequence_length={"caption": 128, "latents": 288, "image": 256, "key_hash": 1},
        split="train", shuffle=True, seed=0, num_epochs=None)

works as elsewhere in seqio, with more promises: the order is that of `kaleido_jax.data.Loader`, a
function of (seed, epoch, index) alone; shards take every n-th example of one order; mixtures are
exact; `start` begins anywhere at no cost. TensorFlow reads the same records, parses them by itself
and decodes pictures with the loader's decoder, after the shuffle.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import seqio
import tensorflow as tf

from kaleido_jax.data import feature_converter, task_table
from kaleido_jax.data.loader import check_hosts
from kaleido_jax.data.python_calls import python_call
from kaleido_jax.data.reader import Encoder, Example, Reader, key_hash
from kaleido_jax.data.record_source import LATENT_NAMES, RecordSource
from kaleido_jax.data.seqio_vocabulary import SeqioVocabulary
from kaleido_jax.data.sources import RecordError, Source
from kaleido_jax.data.streams import Mixture, Stream, make_stream
from kaleido_jax.data.task_table import MixtureSpec, TaskSpec
from kaleido_jax.errors import UserError
from kaleido_jax.tokens import Vocabulary
from kaleido_jax.types import Batch

_UNBOUNDED = 2**24  # tokens, where no length is given
_ENDLESS = 2**62
_CHUNK = 256  # positions that are permuted at once


class RecordDataSource(seqio.DataSource):
    """The records of a task as seqio's source: each one parsed, its picture still encoded.

    Args:
      spec: the task.
      data_dir: the data folder; "" for TFDS's, see `task_table.data_folder`.
    """

    def __init__(self, spec: TaskSpec, data_dir: str = ""):
        self.spec, self.data_dir = spec, data_dir
        super().__init__((), caching_permitted=False, performs_internal_shuffling=True)

    @property
    def splits(self) -> Sequence[str]:
        """Those of the records that are there."""
        return tuple(task_table.splits(self.spec, self.data_dir))

    @property
    def supports_arbitrary_sharding(self) -> bool:
        """Any example can be read alone."""
        return True

    def num_input_examples(self, split: str) -> int:
        """Records of a split; UserError for an unknown one."""
        return len(self.open(split))

    def list_shards(self, split: str) -> Sequence[str]:
        """Names of the split's files."""
        return [str(path) for path in self.open(split).paths]

    def open(self, split: str) -> RecordSource:
        """The records, without TensorFlow."""
        return task_table.task_source(self.spec.name, self.data_dir, split)

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        *,
        num_epochs: int | None = 1,
    ) -> tf.data.Dataset:
        """Records: key, image (encoded), height, width, caption, the task's latents, index."""
        source = self.open(split)
        stream = make_stream(source, _seed(seed), shuffle)
        return _records(source, _indices(stream, num_epochs, shard_info, 0))


class _Exact:
    """get_dataset of tasks and mixtures alike."""

    spec: TaskSpec | MixtureSpec
    data_dir: str
    vocabulary: Vocabulary

    def exact_dataset(
        self,
        sequence_length: Mapping[str, int | None] | None,
        split: str,
        shuffle: bool,
        seed: int | None,
        shard_info: seqio.ShardInfo | None,
        num_epochs: int | None,
        start: int,
        trim: bool,
    ) -> tf.data.Dataset:
        """Features caption, latents, image and key_hash, and the key and index beside them."""
        lengths = dict(sequence_length or {})

        def longest(name: str) -> int:
            return _UNBOUNDED if lengths.get(name) is None or not trim else lengths[name]

        if lengths.get("image") not in (None, self.spec.size):
            raise UserError(
                f"{self.spec.name}: sequence_length names pictures of {lengths['image']} pixels, "
                f"the records have {self.spec.size}"
            )
        source = task_table.task_source(self.spec.name, self.data_dir, split)
        encode = Encoder(
            self.vocabulary,
            self.spec.latents,
            longest("caption"),
            longest("latents"),
            self.spec.size,
        )
        stream = make_stream(source, _seed(seed), shuffle)
        reader = Reader(source, encode, stream, in_order=not shuffle)
        records = _records(source, _indices(stream, num_epochs, shard_info, start))
        return _encoded(source, reader, records)


class ExactTask(_Exact, seqio.Task):
    """A task whose order is a function of (seed, epoch, index)."""

    def __init__(self, spec: TaskSpec, vocabulary: Vocabulary, data_dir: str = ""):
        super().__init__(
            spec.name,
            source=RecordDataSource(spec, data_dir),
            output_features=output_features(vocabulary),
            shuffle_buffer_size=None,
        )
        self.spec, self.vocabulary, self.data_dir = spec, vocabulary, data_dir

    def get_dataset(
        self,
        sequence_length: Mapping[str, int | None] | None = None,
        split: str = "train",
        use_cached: bool = False,
        shuffle: bool = True,
        shuffle_buffer_size: int | None = None,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        num_epochs: int | None = 1,
        trim_output_features: bool = True,
        try_in_mem_cache: bool = True,
        start: int = 0,
    ) -> tf.data.Dataset:
        """See seqio.Task. Nothing is cached or buffered: the options that say so do nothing.

        Args:
          seed: None is 0: there is no hidden randomness.
          start: leaves out this many examples (of this shard), at no cost.
          trim_output_features: False leaves captions and latents as long as they are.

        Raises:
          UserError: no such records or split, another size of pictures than theirs, arguments out
            of range.
        """
        ds = self.exact_dataset(
            sequence_length,
            split,
            shuffle,
            seed,
            shard_info,
            num_epochs,
            start,
            trim_output_features,
        )
        ds = self._validate_preprocessing(ds)
        if trim_output_features:
            ds = self._trim_output_features(ds, sequence_length=sequence_length)
        return ds.prefetch(tf.data.AUTOTUNE)


class ExactMixture(_Exact, seqio.Mixture):
    """A mixture with exact shares; z opens with section tokens, so that it tells what it holds."""

    def __init__(
        self,
        spec: MixtureSpec,
        tasks: Sequence[ExactTask],
        vocabulary: Vocabulary,
        data_dir: str = "",
    ):
        super().__init__(spec.name, [(task, spec.rates[task.name]) for task in tasks])
        self.spec, self.vocabulary, self.data_dir = spec, vocabulary, data_dir

    def get_dataset(
        self,
        sequence_length: Mapping[str, int | None] | None = None,
        split: str = "train",
        use_cached: bool = False,
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        num_epochs: int | None = None,
        copy_pretokenized: bool = False,
        compute_stats_empirically: bool = False,
        log_mixing_proportions: bool = True,
        passthrough_features: Sequence[str] | None = None,
        trim_output_features: bool = True,
        try_in_mem_cache: bool = True,
        start: int = 0,
    ) -> tf.data.Dataset:
        """See seqio.Mixture and `ExactTask.get_dataset`.

        With `num_epochs` it ends where the first of its tasks has been seen that often.
        """
        ds = self.exact_dataset(
            sequence_length,
            split,
            shuffle,
            seed,
            shard_info,
            num_epochs,
            start,
            trim_output_features,
        )
        keep = {*self.output_features, *(passthrough_features or ())}
        ds = ds.map(lambda example: {k: v for k, v in example.items() if k in keep})
        if trim_output_features:
            ds = seqio.utils.trim_dataset(ds, sequence_length, self.output_features)
        return ds.prefetch(tf.data.AUTOTUNE)


def output_features(vocabulary: Vocabulary) -> dict[str, seqio.Feature]:
    """The features of every task; `key_hash` is int64 [1], see `reader.key_hash`."""
    ids = SeqioVocabulary(vocabulary)
    plain = seqio.PassThroughVocabulary(0)
    return {
        "caption": seqio.Feature(ids, add_eos=True),
        "latents": seqio.Feature(ids, add_eos=True),
        "image": seqio.Feature(plain, add_eos=False, dtype=tf.uint8, rank=3),
        "key_hash": seqio.Feature(plain, add_eos=False, dtype=tf.int64),
    }


def feature_lengths(name: str) -> dict[str, int]:
    """`task_feature_lengths` of a task or mixture: every feature's, as seqio wants them."""
    spec = task_table.find(name)
    return {
        "caption": task_table.CAPTION_LENGTH,
        "latents": spec.latent_length,
        "image": spec.size,
        "key_hash": 1,
    }


def register(vocabulary: Vocabulary | None = None, data_dir: str = "") -> None:
    """(Re)registers the table's tasks and mixtures with seqio.

    Args:
      vocabulary: T5's, for example `Vocabulary.from_file("spiece.model", 8192)`; None: the
        shipped one with 8,192 vokens.
      data_dir: the data folder; "" for TFDS's.
    """
    vocabulary = vocabulary or Vocabulary.default(task_table.NUM_VOKENS)
    for spec in task_table.TASKS.values():
        seqio.TaskRegistry.remove(spec.name)
        seqio.TaskRegistry.add_provider(spec.name, ExactTask(spec, vocabulary, data_dir))
    for spec in task_table.MIXTURES.values():
        seqio.MixtureRegistry.remove(spec.name)
        parts = [seqio.TaskRegistry.get(task) for task in spec.rates]
        mixture = ExactMixture(spec, parts, vocabulary, data_dir)
        seqio.MixtureRegistry.add_provider(spec.name, mixture)


def batches(
    name: str,
    batch_size: int,
    *,
    split: str = "train",
    shuffle: bool = True,
    seed: int = 0,
    start: int = 0,
    num_epochs: int | None = None,
    host_index: int = 0,
    host_count: int = 1,
    lengths: Mapping[str, int] | None = None,
) -> Iterator[Batch]:
    """This host's part of the batches of a registered task or mixture, through TensorFlow.

    Args:
      name: of the task or mixture.
      batch_size: over all hosts.
      split, shuffle, seed, num_epochs: as in `get_dataset`.
      start: the step to begin with; any costs the same.
      host_index, host_count: hosts take turns at the examples of one order.
      lengths: of the features, default `feature_lengths`.

    Raises:
      UserError: as `get_dataset`; hosts that cannot share the batch evenly.
    """
    check_hosts(batch_size, host_index, host_count)
    lengths = dict(lengths or feature_lengths(name))
    rows = batch_size // host_count
    ds = seqio.get_mixture_or_task(name).get_dataset(
        lengths,
        split=split,
        shuffle=shuffle,
        seed=seed,
        shard_info=seqio.ShardInfo(host_index, host_count),
        num_epochs=num_epochs,
        start=start * rows,
    )
    ds = feature_converter.KaleidoFeatureConverter()(ds, lengths)
    return feature_converter.iterate(ds, rows)


def _seed(seed: int | None) -> int:
    try:
        return 0 if seed is None else operator.index(seed)
    except TypeError as error:
        raise UserError(f"seed is {seed!r}; it must be a whole number or None") from error


def _indices(
    stream: Stream, num_epochs: int | None, shard: seqio.ShardInfo | None, start: int
) -> tf.data.Dataset:
    """Numbers in the source, int64, in the stream's order. Raises UserError."""
    shard = shard or seqio.ShardInfo(0, 1)
    if not 0 <= shard.index < shard.num_shards:
        raise UserError(f"shard {shard.index} of {shard.num_shards}: it must be one from 0 on")
    if start < 0:
        raise UserError(f"start is {start}; it must not be negative")
    if num_epochs is not None and num_epochs < 1:
        raise UserError(f"num_epochs is {num_epochs}; it must be 1 or more, or None for no end")
    stop = _ENDLESS if num_epochs is None else stream.length(num_epochs)
    positions = tf.data.Dataset.range(
        shard.index + start * shard.num_shards, stop, shard.num_shards
    )

    def draw(position: tf.Tensor) -> tf.Tensor:
        index = python_call(stream.indices, [position], tf.int64)
        return tf.ensure_shape(index, [None])

    return positions.batch(_CHUNK).map(draw).unbatch()


def _records(source: Source, indices: tf.data.Dataset) -> tf.data.Dataset:
    """Records by number, parsed by TensorFlow; of one that cannot be used, index and blanks."""
    strings = ("image", *_texts(source))
    # Only what is needed: what else a record holds may be broken.
    fields = {
        **{name: tf.io.FixedLenFeature([], tf.string, "") for name in strings},
        **{name: tf.io.FixedLenFeature([], tf.int64, 0) for name in ("height", "width")},
    }

    def read(index: np.ndarray) -> bytes:
        records, number = _part(source, int(index))
        try:
            raw = records.raw(number)
            records.parse(raw, number)
        except RecordError:
            return b""  # the reader will count it and find a stand-in
        return raw

    def load(index: tf.Tensor) -> dict[str, tf.Tensor]:
        raw = tf.ensure_shape(python_call(read, [index], tf.string), [])
        return {"index": index, **tf.io.parse_single_example(raw, fields)}

    return indices.map(load, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)


def _encoded(source: Source, reader: Reader, records: tf.data.Dataset) -> tf.data.Dataset:
    """Records to features, their pictures decoded."""
    names = _texts(source)

    def encode(index, image, height, width, *texts):
        records, _ = _part(source, int(index))
        values = dict(zip(names, texts, strict=True))

        def example() -> Example:
            if not image:
                return source[int(index)]  # says what is wrong with it
            return records.decode(
                {
                    "key": values["key"].decode("utf-8"),
                    "image": image,
                    "height": int(height),
                    "width": int(width),
                    "caption": values["caption"].decode("utf-8"),
                    "latents": {name: values[name].decode("utf-8") for name in records.latents},
                }
            )

        row = reader.read(int(index), example)
        return (
            np.array(row.caption, np.int32),
            np.array(row.latents, np.int32),
            row.image,
            np.array([key_hash(row.key)], np.int64),
            row.key.encode("utf-8"),
        )

    def convert(record: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        inputs = [record[name] for name in ("index", "image", "height", "width", *names)]
        kinds = (tf.int32, tf.int32, tf.uint8, tf.int64, tf.string)
        caption, latents, image, hashed, key = python_call(encode, inputs, kinds)
        side = reader.encode.image_size
        return {
            "caption": tf.ensure_shape(caption, [None]),
            "latents": tf.ensure_shape(latents, [None]),
            "image": tf.ensure_shape(image, [side, side, 3]),
            "key_hash": tf.ensure_shape(hashed, [1]),
            "key": tf.ensure_shape(key, []),
            "index": record["index"],
        }

    return records.map(convert, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)


def _texts(source: Source) -> tuple[str, ...]:
    """The fields of text that a source's examples need."""
    parts = source.sources if isinstance(source, Mixture) else (source,)
    return ("key", "caption", *(n for n in LATENT_NAMES if any(n in p.latents for p in parts)))


def _part(source: Source, index: int) -> tuple[RecordSource, int]:
    """The records that hold example `index`, and its number there."""
    if isinstance(source, Mixture):
        part, number = source.part_of(index)
        return source.sources[part], number
    return source, index


register()
