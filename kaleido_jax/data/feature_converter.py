"""From a task's features to the model's, and to `Batch`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import seqio
import tensorflow as tf

from kaleido_jax.types import Batch

_Spec = seqio.FeatureConverter.FeatureSpec


class KaleidoFeatureConverter(seqio.FeatureConverter):
    """Pads ids and names the features as `Batch` does; nothing is packed.

    Task features: caption, latents (int32 ids with EOS), image (uint8 [side, side, 3]; its length
    is its side) and key_hash (int64 [1]). Model features: caption_tokens, latent_tokens, image,
    key_hash, as in `kaleido_jax.types.Batch`.
    """

    TASK_FEATURES = {
        "caption": _Spec(dtype=tf.int32),
        "latents": _Spec(dtype=tf.int32),
        "image": _Spec(dtype=tf.uint8, rank=3),
        "key_hash": _Spec(dtype=tf.int64),
    }
    MODEL_FEATURES = {
        "caption_tokens": _Spec(dtype=tf.int32),
        "latent_tokens": _Spec(dtype=tf.int32),
        "image": _Spec(dtype=tf.uint8, rank=3),
        "key_hash": _Spec(dtype=tf.int64, rank=0),
    }

    def __init__(self):
        super().__init__(pack=False)

    def _convert_features(
        self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]
    ) -> tf.data.Dataset:
        lengths = task_feature_lengths
        side = lengths["image"]

        def pad(ids: tf.Tensor, length: int) -> tf.Tensor:
            return tf.ensure_shape(tf.pad(ids, [[0, length - tf.shape(ids)[0]]]), [length])

        def convert(example: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
            return {
                "caption_tokens": pad(example["caption"], lengths["caption"]),
                "latent_tokens": pad(example["latents"], lengths["latents"]),
                "image": tf.ensure_shape(example["image"], [side, side, 3]),
                "key_hash": example["key_hash"][0],
            }

        return ds.map(convert, num_parallel_calls=tf.data.AUTOTUNE)

    def get_model_feature_lengths(self, task_feature_lengths: Mapping[str, int]) -> dict[str, int]:
        """Lengths of the model's features."""
        return {
            "caption_tokens": task_feature_lengths["caption"],
            "latent_tokens": task_feature_lengths["latents"],
            "image": task_feature_lengths["image"],
            "key_hash": task_feature_lengths["key_hash"],
        }


def to_batch(features: Mapping[str, np.ndarray]) -> Batch:
    """The `Batch` of one batched element of a converted data set, as numpy."""
    return Batch(
        caption_tokens=features["caption_tokens"],
        latent_tokens=features["latent_tokens"],
        image=features["image"],
        key_hash=features["key_hash"].astype(np.uint32),
    )


def iterate(ds: tf.data.Dataset, batch_size: int) -> Iterator[Batch]:
    """Batches of a converted data set; what is left over at its end is dropped."""
    batched = ds.batch(batch_size, drop_remainder=True).prefetch(tf.data.AUTOTUNE)
    return map(to_batch, batched.as_numpy_iterator())
