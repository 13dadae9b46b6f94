"""What of the pipeline draws sets of latents, draws some of them anew, and edits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from kaleido_jax import diverse, editing, resampling
from kaleido_jax.batches import MAX_PICTURES, MAX_SEED, check_range
from kaleido_jax.latents import LatentDocument

if TYPE_CHECKING:
    from kaleido_jax.outputs import Output


class EditMethods:
    """The part of `generate.Pipeline` that needs no more than its other methods."""

    def draw_diverse(
        self, prompts: str | Sequence[str], num_images: int, candidates: int, **options: Any
    ) -> list[LatentDocument]:
        """Draws `candidates` latents for each prompt and keeps the most different (diverse.py).

        Args:
          num_images: how many to keep for each prompt, at most `candidates`.
          candidates: how many to draw.
          options: as `draw_latents`.

        Raises:
          UserError: anything out of bounds.
        """
        check_range("candidates", candidates, 1, MAX_PICTURES)
        check_range("num_images", num_images, 1, candidates)
        drawn = self.draw_latents(prompts, candidates, **options)
        groups = [drawn[i : i + candidates] for i in range(0, len(drawn), candidates)]
        return [group[i] for group in groups for i in diverse.most_diverse(group, num_images)]

    def resample(
        self,
        document: LatentDocument,
        free: Sequence[str],
        *,
        seed: int = 0,
        step: int = 0,
        candidates: int = 16,
        batch_size: int | None = None,
        on_draw: Callable[[], None] | None = None,
        **settings: Any,
    ) -> LatentDocument:
        """A document with some latents drawn anew, given the caption and the others.

        Exact where the free latents come last; approximate, by `candidates` weighted draws, where
        a kept one follows them (resampling.py).

        Args:
          free: the latents to draw.
          seed, step: decide the random numbers of the draw; the noise of the picture stays.
          candidates: 1..256.
          batch_size, on_draw, settings: as `draw_latents`.

        Raises:
          UserError: an unknown latent, anything out of bounds, no room beside the kept latents.
        """
        check_range("seed", seed, 0, MAX_SEED)
        chosen = self.defaults.replace({**settings, "constrained": True})
        redrawn = resampling.redraw(
            self.runner,
            self._vocabulary,
            self._constraint() if self.names else None,
            self.names,
            self._caption_tokens([document.caption])[0],
            document.latents,
            free,
            chosen,
            seed=seed,
            index=document.sample_index,
            step=step,
            candidates=candidates,
            batch=self.runner.batch_size(batch_size, candidates),
            on_draw=on_draw,
        )
        decoding = {
            **chosen.decoding(),
            "seed": seed,
            "resampled": list(free),
            "candidates": redrawn.candidates,
            "effective_candidates": round(redrawn.effective, 2),
        }
        if redrawn.tokens is not None:
            decoding["tokens"] = redrawn.tokens
        return dataclasses.replace(
            document, latents=redrawn.latents, decoding=decoding, log_prob=redrawn.log_prob
        )

    def edit_document(
        self,
        document: LatentDocument,
        step: editing.Step,
        *,
        seed: int = 0,
        number: int = 0,
        candidates: int = 16,
        on_draw: Callable[[], None] | None = None,
        **settings: Any,
    ) -> LatentDocument:
        """A document after one step of edits, latents drawn anew included; no picture is made.

        Args:
          step: a list of (verb, argument) as editing.py has them.
          seed, number: decide what is drawn anew; `number` is that of the step in its sequence.
          candidates, on_draw, settings: as `resample`.

        Raises:
          UserError: an edit that cannot be made.
        """
        changed = editing.apply(document, step)
        if free := editing.free_latents(step, self.names):
            changed = self.resample(
                changed,
                free,
                seed=seed,
                step=number,
                candidates=candidates,
                on_draw=on_draw,
                **settings,
            )
        return changed

    def edit(
        self,
        document: LatentDocument,
        steps: Sequence[editing.Step],
        *,
        seed: int = 0,
        candidates: int = 16,
        batch_size: int | None = None,
        **settings: Any,
    ) -> Output:
        """The picture of a document and those after each of a sequence of edits (Figure 14).

        All have the document's noise, so what an edit does not touch stays alike.

        Args:
          steps: each a list of (verb, argument) as editing.py has them, made one after another.
          seed, candidates: as `resample`.
          batch_size, settings: as `render`.

        Raises:
          UserError: an edit that cannot be made, before any picture is.
        """
        documents = [document]
        for number, step in enumerate(steps):
            documents.append(
                self.edit_document(
                    documents[-1],
                    step,
                    seed=seed,
                    number=number,
                    candidates=candidates,
                    **settings,
                )
            )
        return self.render(documents, batch_size=batch_size, **settings)
