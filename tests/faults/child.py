"""`kaleido` as a process of its own that tests kill, stop and starve: python -m tests.faults.child

Without TensorBoard, whose import takes seconds. One more source, `hanging`, is the toy whose reads
block for ever after some number of them, as a file system does whose server is gone.

    [PROCESS/COUNT:PORT] train --config tests/faults/toy.py --workdir DIR
"""

from __future__ import annotations

import sys
import threading
from typing import Any

sys.modules["clu"] = None

from kaleido_jax import cli, data  # noqa: E402
from kaleido_jax.data import ToySource  # noqa: E402


class HangingSource(ToySource):
    """The toy; reads after the first `reads` never come back."""

    def __init__(self, seed: int, num_examples: int, reads: int):
        super().__init__(num_examples, seed)
        self._left = reads

    def __getitem__(self, index: int) -> Any:
        self._left -= 1
        if self._left < 0:
            threading.Event().wait()
        return super().__getitem__(index)


def main(words: list[str]) -> int:
    """Runs the command, as one of several processes where the first word says so."""
    data.SOURCES["hanging"] = HangingSource
    place, slash, rest = words[0].partition("/")
    if slash:
        import jax

        count, _, port = rest.partition(":")
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{port}", int(count), int(place))
        words = words[1:]
    return cli.main(words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
