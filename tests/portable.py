"""Does an export give the same pictures where only the core is installed? Run it in two places.

    python -m tests.portable make FOLDER     # anywhere: an export and the pictures of its model
    python -m tests.portable check FOLDER    # in the other environment: same pictures, or exit 1

`check` refuses to import TensorFlow, PyTorch, orbax and clu, installed or not, and measures what
`from kaleido_jax import Pipeline` costs in seconds and in resident memory.
"""

from __future__ import annotations

import json
import pathlib
import sys
import time

ABSENT = ("tensorflow", "torch", "orbax", "clu", "seqio", "tensorflow_datasets", "transformers")
MAX_SECONDS, MAX_MIB = 3.0, 250.0
# The order of sums may differ between machines; pictures are in [-1, 1].
TOLERANCE = 1e-4
SETTINGS = dict(num_images=2, seed=7, num_steps=8, guidance_weight=3.0)
PROMPT = "dawn: a red shape"


class Refuse:
    """An import finder under which the libraries are not there."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ImportError(f"{name} is not part of the core")


def resident_peak() -> int:
    """Bytes; by Linux, whose `getrusage` would count what the parent process had at the fork."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))


def make(folder: pathlib.Path) -> None:
    """Exports the trained shapes model and writes its pictures beside."""
    import numpy as np

    from kaleido_jax import Pipeline

    assets = pathlib.Path(__file__).resolve().parent.parent / "kaleido_jax" / "assets"
    pipe = Pipeline.from_pretrained(assets / "shapes_kaleido")
    pipe.save_pretrained(folder / "export", "float16")
    out = pipe(PROMPT, **SETTINGS)
    documents = np.array([json.dumps(document.latents) for document in out.documents])
    np.savez(folder / "pictures.npz", samples=out.samples, latents=documents)


def check(folder: pathlib.Path) -> int:
    """Draws them again from the export; prints figures, returns the exit status."""
    sys.meta_path.insert(0, Refuse())
    started, before = time.perf_counter(), time.process_time()
    from kaleido_jax import Pipeline

    # What other programs take of the machine meanwhile does not count against the limit.
    seconds, wall = time.process_time() - before, time.perf_counter() - started
    mebibytes = resident_peak() / 2**20
    print(f"import: {seconds:.2f} s ({wall:.2f} s of time), {mebibytes:.0f} MiB resident")
    import numpy as np

    out = Pipeline.from_pretrained(folder / "export")(PROMPT, **SETTINGS)
    with np.load(folder / "pictures.npz") as file:
        error = float(np.abs(out.samples - file["samples"]).max())
        same = [json.loads(str(text)) for text in file["latents"]]
    loaded = sorted(name for name in ABSENT if name in sys.modules)
    print(f"pictures: {error:.1e} apart; loaded of {', '.join(ABSENT)}: {', '.join(loaded) or '-'}")
    holds = {
        f"pictures differ by {error:.1e}": error <= TOLERANCE,
        "latents differ": same == [document.latents for document in out.documents],
        f"loaded {loaded}": not loaded,
        f"import takes {seconds:.1f} s, over {MAX_SECONDS}": seconds < MAX_SECONDS,
        f"import takes {mebibytes:.0f} MiB, over {MAX_MIB}": mebibytes < MAX_MIB,
    }
    for complaint in (text for text, ok in holds.items() if not ok):
        print(complaint, file=sys.stderr)
    return 0 if all(holds.values()) else 1


if __name__ == "__main__":
    what, where = sys.argv[1], pathlib.Path(sys.argv[2])
    sys.exit(check(where) if what == "check" else make(where))
