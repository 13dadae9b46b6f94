"""How much is sampled and measured, by name."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Sizes of an evaluation.

    Attributes:
      samples: pictures that are drawn.
      references: training pictures for FID; 0 is all.
      neighbours: of these, how many for precision, recall, density and coverage; 0 is all.
      splits: of the Inception score.
      bootstrap: resamples of each interval.
    """

    samples: int
    references: int
    neighbours: int
    splits: int
    bootstrap: int


PROTOCOLS = {
    # Minutes on a CPU: enough to see whether something is wrong, too few to compare with papers.
    "quick": Protocol(1_000, 2_000, 2_000, 1, 100),
    # Dhariwal & Nichol 2021: FID against the whole training set, recall against 10,000 of it.
    "adm": Protocol(50_000, 0, 10_000, 10, 50),
    # Sec. 4.2 of the paper: "50k samples against the full training set", both FID and recall.
    "paper": Protocol(50_000, 0, 0, 10, 50),
}
