"""What the demo claims, held against what it measured."""

from __future__ import annotations

import dataclasses
import operator

_RELATIONS = {"<": operator.lt, ">=": operator.ge}


@dataclasses.dataclass(frozen=True)
class Check:
    """One claim: `measured` must stand in `relation` ('<' or '>=') to `bound`.

    `percent` says how to write the two numbers.
    """

    claim: str
    measured: float
    relation: str
    bound: float
    percent: bool = False

    def __post_init__(self):
        if self.relation not in _RELATIONS:
            raise ValueError(f"unknown relation {self.relation!r}")

    @property
    def passed(self) -> bool:
        """Whether the numbers bear the claim out; NaN never does."""
        return bool(_RELATIONS[self.relation](self.measured, self.bound))

    @property
    def verdict(self) -> str:
        return "holds" if self.passed else "does not hold"

    def numbers(self) -> str:
        """'3.1% < 5%', with the measured value first."""
        sign = {"<": "<", ">=": "≥"}[self.relation]
        if self.percent:
            return f"{self.measured:.1%}, wanted {sign} {self.bound:.0%}"
        return f"{self.measured:.2f}, wanted {sign} {self.bound:.2f}"

    def line(self) -> str:
        """One line for the terminal."""
        return f"{'PASS' if self.passed else 'FAIL'}  {self.claim}: {self.numbers()}"

    def as_dict(self) -> dict:
        """For results.json."""
        return dataclasses.asdict(self) | {"passed": self.passed}
