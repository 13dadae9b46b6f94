"""What weights cost in memory, measured in processes of their own.

    python -m tests.memory_weights import FOLDER [--layers N]  # a T5, XL by default, imported
    python -m tests.memory_weights paper FOLDER                # the paper's model, exported, drawn

FOLDER gets tens of gigabytes and is left for a look. `paper` writes random weights of the 64-pixel
model (T5-XL encoder and decoder, the UNet of App. B.1), exports them in float32 and bfloat16, opens
the export and draws one step; it needs 20 GB of memory and is not part of the test suite.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
import threading
import time

from tests.portable import resident_peak

SHARD_BYTES = 2 << 30


class Peak:
    """Peak of this process's own memory (RssAnon: without files that are only mapped)."""

    def __init__(self) -> None:
        self.anonymous, self._stop = 0, threading.Event()
        self.before = self._read()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _read(self) -> int:
        for line in pathlib.Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) << 10
        return 0

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self.anonymous = max(self.anonymous, self._read())

    def figures(self) -> dict[str, float]:
        """GiB: peak of own memory, the same beyond the start, peak with mapped files."""
        self._stop.set()
        self._thread.join()
        figures = {
            "own_peak": self.anonymous,
            "own_peak_beyond_start": self.anonymous - self.before,
            "resident_peak": resident_peak(),
        }
        return {name: round(value / 2**30, 3) for name, value in figures.items()}


def write_t5(folder: pathlib.Path, layers: int) -> None:
    """A Hugging Face T5 as wide as XL, of cheap random weights, in shards."""
    import numpy as np

    from kaleido_jax import tensor_files
    from kaleido_jax.configs import base
    from kaleido_jax.interop import t5
    from kaleido_jax.models.t5 import T5Config

    cfg = T5Config.from_dict(base.t5(num_encoder_layers=layers, num_decoder_layers=layers))
    folder.mkdir(parents=True)
    names = t5._huggingface_names(cfg, t5.PARTS)
    shapes = t5.expected_shapes(cfg)
    noise = np.random.default_rng(0).standard_normal(1 << 20, np.float32)

    def tensor(shape):
        return tensor_files.Tensor(shape, np.dtype("f4"), lambda: np.resize(noise, shape))

    state = {
        n: tensor(shapes[p][::-1] if turned else shapes[p]) for p, (n, turned) in names.items()
    }
    shards: list[dict] = [{}]
    for name, value in state.items():
        if sum(tensor_files.sizes_of(shards[-1]).values()) > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = value
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, shard in zip(files, shards, strict=True):
        tensor_files.write(folder / file, shard)
    places = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(t5.config_to_huggingface(cfg)))


def import_t5(folder: pathlib.Path) -> dict[str, float]:
    """Imports it with room for 8192 vokens; nothing of the result stays in memory."""
    from kaleido_jax.interop import imports

    peak, started = Peak(), time.monotonic()
    plan = imports.plan_t5(folder / "hf")
    plan.write(folder / "imported")
    size = (folder / "imported" / "model.safetensors").stat().st_size
    seconds = time.monotonic() - started
    return {"result": round(size / 2**30, 3), "seconds": round(seconds, 1), **peak.figures()}


def paper_config():
    """The paper's text-to-image model at 64 pixels."""
    from ml_collections import ConfigDict

    from kaleido_jax.configs import base

    config = base.get_config()
    config.data.image_size = 64
    config.model.denoiser = ConfigDict({"name": "unet"} | base.unet())
    config.vocabulary.num_vokens = 8192
    config.sample.steps = 1
    return config


def export_paper(folder: pathlib.Path, dtype: str) -> dict[str, float]:
    """Exports random weights, made tensor by tensor."""
    import flax.linen as nn
    import flax.traverse_util as traverse
    import jax
    import jax.numpy as jnp
    import numpy as np

    from kaleido_jax import bundle, tensor_files
    from kaleido_jax.models.kaleido import Kaleido, KaleidoConfig

    peak, started = Peak(), time.monotonic()
    config = paper_config()
    boxed = jax.eval_shape(
        Kaleido(KaleidoConfig.from_config(config)).init,
        jax.random.key(0),
        jnp.ones((1, config.data.caption_length), jnp.int32),
        jnp.ones((1, config.data.latent_length), jnp.int32),
        (jnp.zeros((1, 64, 64, 3)),),
        jnp.zeros((1,)),
    )["params"]
    flat = traverse.flatten_dict(nn.meta.unbox(boxed), sep="/")
    noise = np.random.default_rng(0).standard_normal(1 << 20, np.float32)

    def tensor(shape):
        scale = np.float32(shape[-2] ** -0.5 if len(shape) > 1 else 1)
        return tensor_files.Tensor(shape, np.dtype("f4"), lambda: np.resize(noise, shape) * scale)

    tensors = {name: tensor(leaf.shape) for name, leaf in flat.items()}
    vocabulary = bundle.make_vocabulary(config)
    bundle.write_export(folder / dtype, config, vocabulary, tensors, dtype, "random weights")
    count = sum(int(np.prod(leaf.shape)) for leaf in flat.values())
    figures = {"parameters": count, "seconds": round(time.monotonic() - started, 1)}
    return {**figures, **peak.figures()}


def render_paper(folder: pathlib.Path, dtype: str) -> dict[str, float]:
    """Opens the export and draws one picture of a document in one step, with guidance."""
    import numpy as np

    from kaleido_jax import LatentDocument, Pipeline

    peak, started = Peak(), time.monotonic()
    pipe = Pipeline.from_pretrained(folder / dtype)
    opened = time.monotonic() - started
    document = LatentDocument(
        caption="a cat on a mat", latents={"bbox": "a cat (100, 100, 500, 500) on a mat"}, seed=0,
        guidance_weight=7.0, sampler="ddpm", steps=1,
    )  # fmt: skip
    out = pipe.render(document)
    assert out.images.shape == (1, 64, 64, 3) and np.isfinite(out.samples).all()
    seconds = {"open_s": round(opened, 1), "seconds": round(time.monotonic() - started, 1)}
    return {**seconds, **peak.figures()}


def measure(what: str, folder: pathlib.Path, *rest: str) -> dict[str, float]:
    """Runs one of the functions above in a process of its own and prints its figures."""
    words = [sys.executable, "-m", "tests.memory_weights", "step", what, str(folder), *rest]
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{what}: exit {result.returncode}: {result.stderr[-2000:]}")
    figures = json.loads(result.stdout.splitlines()[-1])
    print(what, *rest, json.dumps(figures), flush=True)
    return figures


STEPS = {"import": import_t5, "export": export_paper, "render": render_paper}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("import", "paper", "step"))
    parser.add_argument("rest", nargs="+")
    parser.add_argument("--layers", type=int, default=24)
    args = parser.parse_args()
    if args.what == "step":
        name, folder, *words = args.rest
        print(json.dumps(STEPS[name](pathlib.Path(folder), *words)))
        return
    folder = pathlib.Path(args.rest[0])
    if args.what == "import":
        write_t5(folder / "hf", args.layers)
        measure("import", folder)
        return
    for dtype in args.rest[1:] or ("float32", "bfloat16"):
        measure("export", folder, dtype)
        measure("render", folder, dtype)


if __name__ == "__main__":
    main()
