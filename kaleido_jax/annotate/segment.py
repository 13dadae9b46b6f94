"""The stage `blob`: each box of a grounded caption becomes a mask, each mask an ellipse."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from kaleido_jax.annotate import ellipses, repair
from kaleido_jax.annotate.answers import Log
from kaleido_jax.annotate.models import ModelSource, device, loading, require
from kaleido_jax.annotate.protocols import Example, Mask, Result, Segmenter, failure
from kaleido_jax.errors import UserError
from kaleido_jax.latents import bbox, blob
from kaleido_jax.latents.bbox import Box
from kaleido_jax.latents.blob import Ellipse
from kaleido_jax.latents.errors import LatentError

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CLASSES = {"sam": "SamModel", "sam2": "Sam2Model", "sam2_video": "Sam2Model"}


def hf_blob_engine(
    stage: str,
    argument: str,
    batch_size: int = 4,
    min_iou: float = 0.5,
    min_inside: float = 0.5,
) -> BlobEngine:
    """Engine `hf:MODEL` for blob: SAM or SAM 2.

    Args:
      stage, argument: as `make_engine`; a hub name, with @REVISION if wanted, or a folder.
      batch_size: pictures at once.
      min_iou: least intersection over union that the model predicts for its mask.
      min_inside: least share of the mask that must lie in its box.

    Raises:
      UserError: no model named.
    """
    source = ModelSource.parse("hf", argument)
    provenance = {"engine": "hf", **source.provenance}
    return BlobEngine(
        functools.partial(HfSegmenter, source), provenance, batch_size, min_iou, min_inside
    )


class BlobEngine:
    """A segmenter as an engine.

    Args:
      load: makes the segmenter; picklable, called in `setup`.
      provenance: of the segmenter; the limits are added here.
      batch_size, min_iou, min_inside: as `hf_blob_engine`.
    """

    stage = "blob"

    def __init__(
        self,
        load: Callable[[], Segmenter],
        provenance: dict[str, Any],
        batch_size: int = 4,
        min_iou: float = 0.5,
        min_inside: float = 0.5,
    ):
        if batch_size < 1:
            raise UserError("batch_size must be at least 1")
        limits = {"min_iou": min_iou, "min_inside": min_inside, "batch_size": batch_size}
        self.provenance = {
            **provenance,
            "parameters": {**provenance.get("parameters", {}), **limits},
        }
        self.batch_size = batch_size
        self._load, self._limits = load, (min_iou, min_inside)
        self._segmenter: Segmenter | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_segmenter": None}

    def setup(self) -> None:
        """Load the model. Raises UserError where it is missing or of another kind."""
        if self._segmenter is None:
            self._segmenter = self._load()

    def annotate(self, examples: Sequence[Example], seed: int) -> list[Result]:
        """One string of blobs each; `empty` without boxes, `rejected` where no mask is usable."""
        self.setup()
        results: list[Result | None] = []
        waiting: list[tuple[int, Example, tuple[bbox.Segment, ...]]] = []
        for example in examples:
            results.append(None)
            if not example.bbox:
                results[-1] = Result("", "empty", ("no boxes",))
                continue
            try:
                segments = bbox.parse(example.bbox)
            except LatentError as error:
                results[-1] = failure(error)
            else:
                waiting.append((len(results) - 1, example, segments))
        for start in range(0, len(waiting), self.batch_size):
            chunk = waiting[start : start + self.batch_size]
            found = self._batch([item[1:] for item in chunk])
            for (index, *_), result in zip(chunk, found, strict=True):
                results[index] = result
        return results

    def _batch(self, items: Sequence[tuple[Example, tuple[bbox.Segment, ...]]]) -> list[Result]:
        try:
            masks = self._segmenter.segment(
                [example.image for example, _ in items],
                [
                    [box.pixels(e.image.shape[:2]) for s in segments for box in s.boxes]
                    for e, segments in items
                ],
            )
            return [
                self._result(segments, found)
                for (_, segments), found in zip(items, masks, strict=True)
            ]
        except Exception as error:  # one bad example must not cost the others their answers
            if len(items) == 1:
                return [failure(error)]
            return [result for item in items for result in self._batch([item])]

    def _result(self, segments: Sequence[bbox.Segment], masks: Sequence[Mask]) -> Result:
        log, following = Log(), iter(masks)
        mentions = []
        for segment in segments:
            found = [self._ellipse(box, next(following), log) for box in segment.boxes]
            mentions.append((segment.phrase, tuple(e for e in found if e is not None)))
        pairs, tail = repair.merge(mentions)
        if not pairs:
            return Result("", "rejected", (*log.issues, "no usable mask"))
        latent = repair.write_grounded(pairs, tail, blob)
        return Result(latent, "repaired" if log.repaired else "ok", tuple(log.issues))

    def _ellipse(self, box: Box, mask: Mask, log: Log) -> Ellipse | None:
        min_iou, min_inside = self._limits
        where = f"box ({box.x1}, {box.y1}, {box.x2}, {box.y2})"
        if mask.score < min_iou:
            log.repair(f"{where}: predicted IoU {mask.score:.2f} is under {min_iou}")
            return None
        area = int(mask.pixels.sum())
        if area < ellipses.LEAST_PIXELS:
            log.repair(f"{where}: the mask has under {ellipses.LEAST_PIXELS} pixels")
            return None
        inside = int(mask.pixels[_window(box, mask.pixels.shape)].sum())
        if inside < min_inside * area:
            log.repair(f"{where}: {inside / area:.0%} of the mask lies in it")
            return None
        found = ellipses.fit(mask.pixels)
        if found is None:
            log.repair(f"{where}: no part of the mask has {ellipses.LEAST_PIXELS} pixels")
            return None
        for mark in found.marks:
            log.note(f"{where}: {mark}")
        return found.ellipse


def _window(box: Box, size: tuple[int, int]) -> tuple[slice, slice]:
    x1, y1, x2, y2 = box.pixels(size)
    return slice(int(y1), int(np.ceil(y2))), slice(int(x1), int(np.ceil(x2)))


class HfSegmenter:
    """SAM or SAM 2 of transformers, asked with boxes.

    Pictures are square here, so the models' own preparation is a resize to their side and
    ImageNet's mean and deviation. It is done here: transformers' for SAM 2 needs torchvision.

    Args:
      source: where the model is.

    Raises:
      UserError: the model cannot be loaded, or is of another kind.
    """

    def __init__(self, source: ModelSource):
        require("torch", "transformers")
        import transformers

        config = loading(
            source, transformers.AutoConfig.from_pretrained, source.name, **source.arguments
        )
        if config.model_type not in _CLASSES:
            raise UserError(
                f"model {source.name} is of type {config.model_type}; blobs need SAM or SAM 2"
            )
        kind = getattr(transformers, _CLASSES[config.model_type])
        model = loading(source, kind.from_pretrained, source.name, **source.arguments)
        self._model = model.to(device()).eval()
        side = self._model.config.prompt_encoder_config.image_size
        self._side = side if isinstance(side, int) else side[0]

    def segment(
        self,
        images: Sequence[UInt8[np.ndarray, "h w 3"]],
        boxes: Sequence[Sequence[tuple[float, float, float, float]]],
    ) -> list[list[Mask]]:
        """See protocols.Segmenter: of three masks per box the one with the best predicted IoU.

        Raises:
          ValueError: a picture is not square, or has no box.
        """
        import torch

        most = max(map(len, boxes))
        prepared, prompts = [], []
        for image, wanted in zip(images, boxes, strict=True):
            if image.shape[0] != image.shape[1]:
                raise ValueError(f"a picture must be square, not {image.shape}")
            if not wanted:
                raise ValueError("a picture without a box cannot be segmented")
            prepared.append(prepare(image, self._side))
            # A batch needs equal counts: the last box is repeated, its answers are left out.
            padded = [*wanted, *[wanted[-1]] * (most - len(wanted))]
            prompts.append(np.array(padded) * (self._side / len(image)))
        with torch.inference_mode():
            out = self._model(
                pixel_values=torch.stack(prepared).to(device(), self._model.dtype),
                input_boxes=torch.from_numpy(np.stack(prompts)).to(device(), self._model.dtype),
                multimask_output=True,
            )
            scores, best = out.iou_scores.max(-1)
            index = best[..., None, None, None].expand(*best.shape, 1, *out.pred_masks.shape[-2:])
            logits = out.pred_masks.gather(2, index)[:, :, 0]
            found = []
            for number, (image, wanted) in enumerate(zip(images, boxes, strict=True)):
                large = torch.nn.functional.interpolate(
                    logits[number, None, : len(wanted)].float(),
                    image.shape[:2],
                    mode="bilinear",
                    align_corners=False,
                )[0]
                pixels = (large > 0).cpu().numpy()
                found.append(
                    [Mask(p, float(s)) for p, s in zip(pixels, scores[number], strict=False)]
                )
        return found


def prepare(image: UInt8[np.ndarray, "h w 3"], side: int) -> Any:
    """A square picture as SAM sees it: float32 tensor [3, side, side]."""
    import torch

    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float()
    if image.shape[0] != side:
        pixels = torch.nn.functional.interpolate(
            pixels, (side, side), mode="bilinear", align_corners=False, antialias=True
        )
    mean, std = (torch.tensor(values)[:, None, None] for values in (_MEAN, _STD))
    return (pixels[0] / 255 - mean) / std
