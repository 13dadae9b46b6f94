"""A TFDS data set, shard by shard, with the pictures as they are stored.

`NAME[/CONFIG][:VERSION]/SPLIT`, for example `imagenet2012/train`. The key of an example is the one
that TFDS gives it (file and place in it), so it stays the same at every reading.
"""

from __future__ import annotations

from typing import Any

from kaleido_jax.data import oracle
from kaleido_jax.data.sources import RecordError
from kaleido_jax.errors import UserError

_CAPTIONS = ("caption", "captions", "text")


class TfdsSplit:
    """One split of a data set that lies prepared on disk.

    Args:
      name: `NAME[/CONFIG][:VERSION]/SPLIT`.
      data_dir: TFDS's folder; "" is its default.

    Attributes:
      shard_names: unique names of the split's shards, in order.
      shard_lengths: examples in each.

    Raises:
      UserError: TFDS is missing, no such data set or split, it is not prepared, it has no pictures.
    """

    def __init__(self, name: str, data_dir: str = ""):
        data, _, self.split = name.rpartition("/")
        if not data or not self.split:
            raise UserError(f"tfds:{name}: write tfds:NAME/SPLIT, for example tfds:cifar10/train")
        try:
            import tensorflow_datasets as tfds
        except ImportError as error:
            raise UserError("TFDS data sets need pip install 'kaleido_jax[data]'") from error
        try:
            self._builder = tfds.builder(data, data_dir=data_dir or None)
        except Exception as error:  # its own error, and many others, for names that are none
            reason = " ".join(str(error).split()).partition(". Available")[0][:200]
            raise UserError(f"tfds:{name}: no such data set: {reason}") from error
        splits = self._builder.info.splits
        if not splits:
            raise UserError(f"tfds:{name} is not prepared in {self._builder.data_dir}")
        if self.split not in splits:
            raise UserError(f"tfds:{name}: no split {self.split!r} (there are {', '.join(splits)})")
        features = self._builder.info.features
        if "image" not in features or not isinstance(features["image"], tfds.features.Image):
            raise UserError(f"tfds:{name} has no feature 'image' that is a picture")
        self._captions = [key for key in _CAPTIONS if key in features]
        if not self._captions and "label" not in features:
            raise UserError(f"tfds:{name} has neither captions nor a feature 'label'")
        self.shard_lengths = list(splits[self.split].shard_lengths)
        self.shard_names = [
            f"{self._builder.name}-{self.split}-{number:05d}"
            for number in range(len(self.shard_lengths))
        ]

    def read(self, number: int) -> list[dict[str, Any]]:
        """All examples of a shard as stored: {key, image: bytes, caption, metadata}, in order.

        The caption is the data set's own, or `a photo of a LABEL`; the label is in the metadata.

        Raises:
          RecordError: the shard's file is missing or damaged.
        """
        import tensorflow as tf
        import tensorflow_datasets as tfds

        dataset = self._builder.as_dataset(
            split=f"{self.split}[{number}shard]",
            decoders={"image": tfds.decode.SkipDecoding()},
            read_config=tfds.ReadConfig(add_tfds_id=True, interleave_cycle_length=1),
            shuffle_files=False,
        )
        try:
            return [self._example(example) for example in tfds.as_numpy(dataset)]
        except tf.errors.OpError as error:
            reason = " ".join(str(error.message).split())[:200]
            raise RecordError(self.shard_names[number], f"cannot be read: {reason}") from error

    def _example(self, example: dict[str, Any]) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        if "label" in example:
            metadata["label"] = self._builder.info.features["label"].int2str(int(example["label"]))
        for name in self._captions:
            if isinstance(example[name], bytes):
                metadata["caption"] = example[name].decode("utf-8", "replace")
        return {
            "key": example["tfds_id"].decode(),
            "image": example["image"],
            "caption": oracle.caption(metadata) if metadata else "",
            "metadata": metadata,
        }
