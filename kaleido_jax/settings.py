"""How to sample: one checked record of everything that a caller may choose."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from kaleido_jax import decode, guidance
from kaleido_jax.errors import UserError
from kaleido_jax.latents import LatentDocument
from kaleido_jax.samplers import SAMPLERS, THRESHOLDS
from kaleido_jax.schedule import NUM_LEVELS
from kaleido_jax.stages import Plan


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of decoding and denoising. Raises UserError if a value is out of bounds.

    Attributes:
      guidance_weight: gamma of Eq. 4 and 8, 0..100; 1 is the conditional model alone.
      guidance_interval: (low, high) in t; outside of it there is no guidance.
      sampler: 'ddpm' or 'ddim'.
      num_steps: 1..1000.
      eta: of DDIM, 0 (deterministic) to 1 (ancestral); 0 for other samplers.
      threshold: 'clip', 'dynamic' or 'none'.
      temperature: of the latents, 0 (greedy) to 100.
      top_k: latent tokens from the k likeliest only; 0 is all.
      top_p: latent tokens from the smallest set of this mass only; 1 is all.
    """

    guidance_weight: float
    guidance_interval: tuple[float, float]
    sampler: str
    num_steps: int
    eta: float
    threshold: str
    temperature: float
    top_k: int
    top_p: float

    def __post_init__(self) -> None:
        guidance.check_guidance(self.guidance_weight, self.guidance_interval)
        decode.check_filter(self.temperature, self.top_k, self.top_p)
        for key, value, known in (
            ("sampler", self.sampler, SAMPLERS),
            ("threshold", self.threshold, THRESHOLDS),
        ):
            if value not in known:
                raise UserError(f"unknown {key} {value!r}; one of {', '.join(known)}")
        if not 1 <= self.num_steps <= NUM_LEVELS:
            raise UserError(f"num_steps is {self.num_steps}; it must be between 1 and {NUM_LEVELS}")
        if not 0.0 <= self.eta <= 1.0:
            raise UserError(f"eta is {self.eta}; it must be between 0 and 1")
        if self.eta and self.sampler != "ddim":
            raise UserError(f"eta is {self.eta}; it belongs to the sampler ddim alone")

    @classmethod
    def of_config(cls, config: ConfigDict) -> Settings:
        """The defaults that `config.sample` states."""
        s = config.sample
        return cls(
            guidance_weight=s.guidance_weight,
            guidance_interval=tuple(s.guidance_interval),
            sampler=s.sampler,
            num_steps=s.steps,
            eta=0.0,
            threshold=s.threshold,
            temperature=s.temperature,
            top_k=s.top_k,
            top_p=s.top_p,
        )

    def replace(self, changes: Mapping[str, Any]) -> Settings:
        """A copy with other values; raises UserError at an unknown name, naming the nearest."""
        known = [field.name for field in dataclasses.fields(self)]
        typed = {}
        for name, value in changes.items():
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
                raise UserError(f"unknown sampling setting {name!r}; the nearest is {near[0]!r}")
            typed[name] = _typed(name, getattr(self, name), value)
        return dataclasses.replace(self, **typed)

    def of_document(self, document: LatentDocument) -> Settings:
        """The settings with which a document's picture was denoised; the rest as here."""
        kept = ("threshold", "eta", "guidance_interval")
        found = {
            name: document.sampler_settings[name]
            for name in kept
            if name in document.sampler_settings
        }
        return self.replace(
            {
                "guidance_weight": document.guidance_weight,
                "sampler": document.sampler,
                "num_steps": document.steps,
                **found,
            }
        )

    def denoising(self) -> dict[str, Any]:
        """The fields of a document that say how its picture was denoised."""
        return {
            "guidance_weight": self.guidance_weight,
            "sampler": self.sampler,
            "steps": self.num_steps,
            "sampler_settings": {
                "threshold": self.threshold,
                "eta": self.eta,
                "guidance_interval": list(self.guidance_interval),
            },
        }

    def plan(self) -> Plan:
        """What of the settings decides the compiled program."""
        guided = self.guidance_weight != 1.0
        return Plan(
            sampler=self.sampler,
            num_steps=self.num_steps,
            threshold=self.threshold,
            eta=self.eta,
            guided=guided,
            interval=guided and self.guidance_interval != (0.0, 1.0),
        )


def _typed(name: str, default: Any, value: Any) -> Any:
    """`value` as the type of the default; numbers of numpy and JSON are welcome, bools not."""
    try:
        if isinstance(value, bool):
            raise TypeError
        if isinstance(default, tuple):
            return tuple(float(item) for item in value)
        if isinstance(default, str):
            return str(value)
        if isinstance(default, int) and int(value) != float(value):
            raise ValueError
        return type(default)(value)
    except (TypeError, ValueError, OverflowError):
        kind = "pair of numbers" if isinstance(default, tuple) else type(default).__name__
        raise UserError(f"{name} is {value!r}; it must be a {kind}, like {default!r}") from None
