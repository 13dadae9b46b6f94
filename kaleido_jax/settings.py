"""How to sample: one checked record of everything that a caller may choose."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from kaleido_jax import decode, guidance
from kaleido_jax.errors import UserError
from kaleido_jax.latents import LatentDocument
from kaleido_jax.samplers import SAMPLERS
from kaleido_jax.schedule import NUM_LEVELS, TIME_GRIDS
from kaleido_jax.stages import Dials, Plan
from kaleido_jax.thresholds import THRESHOLDS

GUIDANCE = ("cfg", "apg")
_RANGES = {
    "latent_guidance_weight": (-1.0, 100.0),
    "guidance_rescale": (0.0, 1.0),
    "apg_eta": (-1.0, 1.0),
    "apg_norm": (0.0, 1e6),
    "apg_momentum": (-1.0, 1.0),
    "cads_scale": (0.0, 10.0),
    "cads_mixing": (0.0, 1.0),
}
# What of the settings a document keeps besides its own fields.
_SAMPLER_SETTINGS = (
    "threshold",
    "eta",
    "guidance_interval",
    "time_grid",
    "guidance",
    "cads_interval",
    *_RANGES,
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of decoding and denoising. Raises UserError if a value is out of bounds.

    Attributes:
      guidance_weight: gamma of Eq. 4 and 8, 0..100; 1 is the conditional model alone.
      guidance_interval: (low, high) in t; outside of it there is no guidance.
      sampler: a name in samplers.SAMPLERS.
      num_steps: 1..1000.
      eta: of DDIM, 0 (deterministic) to 1 (ancestral); 0 for other samplers.
      threshold: 'clip', 'dynamic' or 'none'.
      temperature: of the latents, 0 (greedy) to 100.
      top_k: latent tokens from the k likeliest only; 0 is all.
      top_p: latent tokens from the smallest set of this mass only; 1 is all.
      time_grid: a name in schedule.TIME_GRIDS.
      guidance: 'cfg' (classifier-free) or 'apg' (adaptive projected).
      latent_guidance_weight: of z alone, 0..100; guidance_weight is then that of the caption.
        Negative: one weight for both, which is Eq. 8.
      guidance_rescale: 0 (off) to 1 (the deviation of the conditional prediction).
      apg_eta, apg_norm, apg_momentum: see guidance.Projection.
      cads_scale: of CADS noise on the condition; 0 is off.
      cads_interval: t below which there is no noise, and above which it is all noise.
      cads_mixing: see guidance.Annealing.
      constrained: latents by their grammars only: all are there, whole, and parse.
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
    time_grid: str = "uniform"
    guidance: str = "cfg"
    latent_guidance_weight: float = -1.0
    guidance_rescale: float = 0.0
    apg_eta: float = 0.0
    apg_norm: float = 0.0
    apg_momentum: float = -0.5
    cads_scale: float = 0.0
    cads_interval: tuple[float, float] = (0.6, 0.9)
    cads_mixing: float = 1.0
    constrained: bool = True

    def __post_init__(self) -> None:
        guidance.check_guidance(self.guidance_weight, self.guidance_interval)
        decode.check_filter(self.temperature, self.top_k, self.top_p)
        for key, value, known in (
            ("sampler", self.sampler, SAMPLERS),
            ("threshold", self.threshold, THRESHOLDS),
            ("time_grid", self.time_grid, TIME_GRIDS),
            ("guidance", self.guidance, GUIDANCE),
        ):
            if value not in known:
                raise UserError(f"unknown {key} {value!r}; one of {', '.join(known)}")
        if not 1 <= self.num_steps <= NUM_LEVELS:
            raise UserError(f"num_steps is {self.num_steps}; it must be between 1 and {NUM_LEVELS}")
        if not 0.0 <= self.eta <= 1.0:
            raise UserError(f"eta is {self.eta}; it must be between 0 and 1")
        if self.eta and self.sampler != "ddim":
            raise UserError(f"eta is {self.eta}; it belongs to the sampler ddim alone")
        for name, (low, high) in _RANGES.items():
            if not low <= getattr(self, name) <= high:
                value = getattr(self, name)
                raise UserError(f"{name} is {value}; it must be between {low:g} and {high:g}")
        low, high = self.cads_interval
        if not 0.0 <= low < high <= 1.0:
            raise UserError(
                f"cads_interval is {self.cads_interval}; it must be (low, high) with"
                " 0 <= low < high <= 1"
            )
        if self.guidance == "apg" and self.latent_guidance_weight >= 0.0:
            raise UserError("guidance 'apg' has no weight of its own for the latents")

    @classmethod
    def of_config(cls, config: ConfigDict) -> Settings:
        """The defaults that `config.sample` states."""
        s = config.sample
        first = cls(
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
        # Configs written before a setting was known do not name it.
        known = {field.name for field in dataclasses.fields(cls)}
        return first.replace({name: s[name] for name in s if name in known})

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
        written = document.sampler_settings
        found = {name: written[name] for name in _SAMPLER_SETTINGS if name in written}
        return self.replace(
            {
                "guidance_weight": document.guidance_weight,
                "sampler": document.sampler,
                "num_steps": document.steps,
                **found,
            }
        )

    def decoding(self) -> dict[str, Any]:
        """What of a document's `decoding` says how its latents were drawn."""
        return {
            "constrained": self.constrained,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
        }

    def denoising(self) -> dict[str, Any]:
        """The fields of a document that say how its picture was denoised."""
        return {
            "guidance_weight": self.guidance_weight,
            "sampler": self.sampler,
            "steps": self.num_steps,
            "sampler_settings": {
                name: list(value) if isinstance(value, tuple) else value
                for name in _SAMPLER_SETTINGS
                for value in [getattr(self, name)]
            },
        }

    def plan(self) -> Plan:
        """What of the settings decides the compiled program."""
        separate = self.latent_guidance_weight >= 0.0
        guided = self.guidance_weight != 1.0 or (separate and self.latent_guidance_weight != 1.0)
        return Plan(
            sampler=self.sampler,
            num_steps=self.num_steps,
            grid=self.time_grid,
            threshold=self.threshold,
            eta=self.eta,
            guided=guided,
            interval=guided and self.guidance_interval != (0.0, 1.0),
            separate=guided and separate,
            projected=guided and self.guidance == "apg",
            rescaled=guided and self.guidance_rescale > 0.0,
            annealed=self.cads_scale > 0.0,
        )

    def dials(self) -> Dials:
        """The numbers that the compiled program reads."""
        return Dials(
            guidance_weight=np.float32(self.guidance_weight),
            interval=np.array(self.guidance_interval, np.float32),
            latent_weight=np.float32(self.latent_guidance_weight),
            projection=guidance.Projection(
                *map(np.float32, (self.apg_eta, self.apg_norm, self.apg_momentum))
            ),
            rescale=np.float32(self.guidance_rescale),
            annealing=guidance.Annealing(
                *map(np.float32, (self.cads_scale, *self.cads_interval, self.cads_mixing))
            ),
        )


def _typed(name: str, default: Any, value: Any) -> Any:
    """`value` as the type of the default; numbers of numpy and JSON are welcome, bools not."""
    try:
        if isinstance(default, bool) and isinstance(value, str):
            value = {"true": True, "false": False}[value.lower()]
        if isinstance(value, bool) or isinstance(default, bool):
            if type(value) is not type(default):
                raise TypeError
            return value
        if isinstance(default, tuple):
            return tuple(float(item) for item in value)
        if isinstance(default, str):
            return str(value)
        if isinstance(default, int) and int(value) != float(value):
            raise ValueError
        return type(default)(value)
    except (KeyError, TypeError, ValueError, OverflowError):
        kind = "pair of numbers" if isinstance(default, tuple) else type(default).__name__
        raise UserError(f"{name} is {value!r}; it must be a {kind}, like {default!r}") from None
