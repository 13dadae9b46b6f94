"""Noise schedules: alpha, sigma and logsnr over 1,000 discrete levels (Eq. 2 of the paper).

Level 0 is the clean image and level 1000 the noisiest; t = level / 1000. A network reads
`time_index = level - 1`, as ml-mdm's released weights expect.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from kaleido_jax.errors import UserError

NUM_LEVELS = 1000
NAMES = ("cosine", "deepfloyd", "ddpm")


def _cosine(logsnr_min: float = -5.0, logsnr_max: float = 5.0) -> np.ndarray:
    """Cosine in logsnr, truncated to [-5, 5] (Salimans & Ho 2022, as used by ml-mdm)."""
    b = np.arctan(np.exp(-0.5 * logsnr_max))
    a = np.arctan(np.exp(-0.5 * logsnr_min)) - b
    logsnr = -2.0 * np.log(np.tan(a * np.linspace(0.0, 1.0, NUM_LEVELS) + b))
    return np.concatenate([[1.0], 1.0 / (1.0 + np.exp(-logsnr))])


def _deepfloyd(max_beta: float = 0.999, offset: float = 0.008) -> np.ndarray:
    """Squared cosine with clipped betas (Nichol & Dhariwal 2021)."""
    t = np.linspace(0.0, 1.0, NUM_LEVELS + 1)
    squared_cosine = np.cos((t + offset) / (1.0 + offset) * np.pi / 2) ** 2
    beta = np.minimum(1.0 - squared_cosine[1:] / squared_cosine[:-1], max_beta)
    return np.concatenate([[1.0], np.cumprod(1.0 - beta)])


def _ddpm(beta_start: float = 1e-4, beta_end: float = 0.02) -> np.ndarray:
    """Linear betas (Ho et al. 2020)."""
    beta = np.linspace(beta_start, beta_end, NUM_LEVELS)
    return np.concatenate([[1.0], np.cumprod(1.0 - beta)])


_TABLES = {"cosine": _cosine, "deepfloyd": _deepfloyd, "ddpm": _ddpm}


@functools.lru_cache(maxsize=64)
def _alpha_bar_table(name: str, scale: float, power: float) -> np.ndarray:
    # Released weights were trained with a float32 table, and a shift magnifies its rounding.
    alpha_bar = _TABLES[name]().astype(np.float32).astype(np.float64)
    shift = scale**power
    # snr' = snr / shift, written without the division by 1 - alpha_bar that fails at level 0.
    shifted = alpha_bar / (alpha_bar + shift * (1.0 - alpha_bar))
    shifted.setflags(write=False)
    return shifted


TIME_GRIDS = ("uniform", "trailing", "logsnr")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A noise schedule, shifted for its resolution by snr / scale**power (Sec. B.1, "shift4").

    Attributes:
      name: 'cosine', 'deepfloyd' or 'ddpm'.
      scale: resolution ratio to the innermost image, >= 1.
      power: exponent of the shift; 1 by default as in ml-mdm.
    """

    name: str = "cosine"
    scale: float = 1.0
    power: float = 1.0

    def __post_init__(self):
        if self.name not in _TABLES:
            raise UserError(f"unknown schedule {self.name!r}; one of {', '.join(NAMES)}")
        if not self.scale >= 1.0:
            raise UserError(f"schedule scale is {self.scale}; it must be at least 1")

    @property
    def alpha_bar_table(self) -> Float[np.ndarray, "1001"]:
        """alpha**2 at levels 0..1000, float64, read-only."""
        return _alpha_bar_table(self.name, float(self.scale), float(self.power))

    def alpha_sigma(self, level: Any) -> tuple[Any, Any]:
        """Returns (alpha, sigma) with alpha**2 + sigma**2 = 1, shaped like `level`.

        `level` in [0, 1000], integer or fractional: between integers both are interpolated
        and renormalised. JAX input gives float32 JAX output, other input numpy float64.
        """
        xp = jnp if isinstance(level, jax.Array) else np
        dtype = np.float32 if xp is jnp else np.float64
        alpha_table = xp.asarray(np.sqrt(self.alpha_bar_table).astype(dtype))
        sigma_table = xp.asarray(np.sqrt(1.0 - self.alpha_bar_table).astype(dtype))
        level = xp.asarray(level)
        if xp.issubdtype(level.dtype, xp.integer):
            return alpha_table[level], sigma_table[level]
        low = xp.clip(xp.floor(level).astype(np.int32), 0, NUM_LEVELS - 1)
        weight = level - low
        alpha = alpha_table[low] * (1 - weight) + alpha_table[low + 1] * weight
        sigma = sigma_table[low] * (1 - weight) + sigma_table[low + 1] * weight
        norm = xp.sqrt(alpha**2 + sigma**2)
        return alpha / norm, sigma / norm

    def alpha(self, level: Any) -> Any:
        """Signal amplitude at `level`."""
        return self.alpha_sigma(level)[0]

    def logsnr(self, level: Any) -> Any:
        """log(alpha**2 / sigma**2) at `level`; infinite at level 0."""
        alpha, sigma = self.alpha_sigma(level)
        xp = jnp if isinstance(alpha, jax.Array) else np
        return 2.0 * (xp.log(alpha) - xp.log(sigma))


def shifted_schedules(
    name: str, ratios: tuple[int, ...], power: float = 1.0, shifted: bool = True
) -> tuple[Schedule, ...]:
    """One schedule per resolution of a pyramid, highest first.

    Args:
      name: schedule name.
      ratios: side of each image over the innermost side, e.g. (4, 1) for 256 and 64 pixels.
      power: exponent of the shift.
      shifted: False gives every resolution the unshifted schedule.
    """
    return tuple(Schedule(name, float(r) if shifted else 1.0, power) for r in ratios)


def time_grid(
    steps: int, name: str = "uniform", schedule: Schedule | None = None
) -> Int[np.ndarray, "steps_plus_1"]:
    """Integer levels from noise to 0 for `steps` sampling steps.

    Args:
      steps: 1..1000.
      name: 'uniform' is ml-mdm's, which begins one spacing below pure noise when steps are few;
        'trailing' is even from 1000 to 0 (Lin et al. 2023, Sec. 3.3); 'logsnr' is even in
        log(alpha / sigma) from level 1000 to 1, as solvers of high order like it.
      schedule: whose log(alpha / sigma) counts; the plain cosine by default.

    Returns:
      `steps + 1` descending levels; the last is 0.

    Raises:
      UserError: steps out of range, or an unknown name.
    """
    if not 1 <= steps <= NUM_LEVELS:
        raise UserError(f"steps is {steps}; it must be between 1 and {NUM_LEVELS}")
    if name == "uniform":
        ratio = (NUM_LEVELS + 1) / (steps + 1)
        return np.round(np.arange(steps, -1, -1) * ratio).astype(np.int64)
    if name == "trailing":
        return np.round(np.linspace(NUM_LEVELS, 0, steps + 1)).astype(np.int64)
    if name != "logsnr":
        raise UserError(f"unknown time grid {name!r}; one of {', '.join(TIME_GRIDS)}")
    known = (schedule or Schedule()).logsnr(np.arange(1, NUM_LEVELS + 1))
    # The last level of a schedule can have no signal at all but for rounding; the step into it
    # would take half of the grid.
    known = np.maximum(known, 2 * known[-2] - known[-3])
    wanted = np.linspace(known[-1], known[0], steps)
    levels = np.interp(wanted, known[::-1], np.arange(NUM_LEVELS, 0, -1.0)).round().astype(np.int64)
    # Where the grid is finer than the levels, each keeps a level of its own.
    for i in range(1, steps):
        levels[i] = min(levels[i], levels[i - 1] - 1)
    least = np.arange(steps, 0, -1)
    return np.append(np.maximum(levels, least), 0)
