"""The memory that the compiler lays out for a train step, found without allocating anything.

On accelerators the step is compiled and the compiler asked. The CPU's compiler spends most of its
time on machine code after the layout is fixed, many minutes for a large model and of no use here,
so it works in a process of its own that is ended as soon as it has written its layout down.
"""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import numpy as np

from kaleido_jax import config as config_lib
from kaleido_jax import mesh
from kaleido_jax.train import Trainer
from kaleido_jax.types import Batch

# In the environment, as some of them are not read from a compilation's own options.
CPU_FLAGS = (
    # As accelerators do: the schedule that needs the least memory, not the widest one.
    "--xla_cpu_enable_concurrency_optimized_scheduler=false",
    # The search for all-reduces to combine takes minutes on a step with hundreds of them.
    "--xla_disable_hlo_passes=cpu-all-reduce-combiner",
    "--xla_dump_hlo_module_re=jit_update",
)
_DEVICES = re.compile(r"\s*--xla_force_host_platform_device_count=\S*")
_ALLOCATION = re.compile(r"allocation \d+: size (\d+), (.*)")
# The compiler writes its layout, then this: when it is there, the layout is whole.
_WRITTEN_AFTER = "*.cpu_after_optimizations-memory-usage-report.txt"
_LAYOUT = "*.cpu_after_optimizations-buffer-assignment.txt"
_POLL_SECONDS = 0.2


def simulated(count: int) -> dict[str, str]:
    """The variables of the environment by which a CPU poses as `count` devices."""
    kept = _DEVICES.sub("", os.environ.get("XLA_FLAGS", "")).strip()
    flags = f"{kept} --xla_force_host_platform_device_count={count}".strip()
    return {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


def abstract_batch(trainer: Trainer) -> Batch:
    """Shapes, types and shardings of a global batch."""
    data, rows = trainer.config.data, trainer.config.train.batch_size
    sharding = mesh.batch_sharding(trainer.mesh)
    side = data.image_size

    def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=sharding)

    return Batch(
        caption_tokens=array(np.int32, data.caption_length),
        latent_tokens=array(np.int32, data.latent_length if trainer.config.latents else 0),
        # The points of the toy are no pixels.
        image=array(np.uint8 if data.channels == 3 else np.float32, side, side, data.channels),
        key_hash=array(np.uint32),
    )


def compile_step(trainer: Trainer) -> Any:
    """The compiled train step of abstract arrays.

    A CPU that stands for other devices does without its own options: the scratch memory of the
    convolutions that they choose is no other device's.
    """
    update = trainer.compiled_update.plain
    with mesh.use_mesh(trainer.mesh):
        return update.lower(trainer.abstract_state(), abstract_batch(trainer)).compile()


def plan(trainer: Trainer) -> dict[str, Any]:
    """What the compiler lays out for one device, in bytes, and how long it took.

    Returns:
      'arguments' (state and batch), 'results' that do not take an argument's place, 'temporaries',
      their sum 'total', 'compiler' (the platform's name) and 'seconds'.

    Raises:
      RuntimeError: the compiler failed; its last words.
    """
    started = time.monotonic()
    platform = trainer.mesh.devices.flat[0].platform
    if platform == "cpu":
        result = _cpu_layout(trainer)
    else:
        found = compile_step(trainer).memory_analysis()
        result = {
            "arguments": found.argument_size_in_bytes,
            "results": found.output_size_in_bytes - found.alias_size_in_bytes,
            "temporaries": found.temp_size_in_bytes,
        }
    result["total"] = sum(result.values())
    return result | {"compiler": platform, "seconds": round(time.monotonic() - started, 1)}


def _cpu_layout(trainer: Trainer) -> dict[str, int]:
    variables = simulated(trainer.mesh.devices.size)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        variables["XLA_FLAGS"] += " ".join(["", *CPU_FLAGS, f"--xla_dump_to={folder}"])
        (folder / "config.json").write_text(config_lib.to_json(trainer.config), "utf-8")
        with open(folder / "said.txt", "w+", encoding="utf-8") as said:
            child = subprocess.Popen(
                [sys.executable, "-m", "kaleido_jax.memory_plan", str(folder)],
                env={**os.environ, **variables},
                stdout=said,
                stderr=said,
            )
            try:
                while not list(folder.glob(_WRITTEN_AFTER)) and child.poll() is None:
                    time.sleep(_POLL_SECONDS)
            finally:
                child.kill()
                child.wait()
            if not list(folder.glob(_WRITTEN_AFTER)):
                said.seek(0)
                last = said.read().strip().splitlines() or ["it said nothing"]
                raise RuntimeError(f"the compiler ended with {child.returncode}: {last[-1]}")
        return read_layout(folder)


def read_layout(folder: pathlib.Path) -> dict[str, int]:
    """Bytes by kind in the layout that XLA's CPU compiler wrote into a folder."""
    sizes = {"arguments": 0, "results": 0, "temporaries": 0}
    (layout,) = folder.glob(_LAYOUT)
    for line in layout.read_text("utf-8").splitlines():
        if match := _ALLOCATION.match(line):
            size, words = int(match[1]), match[2]
            if words.startswith("parameter "):
                sizes["arguments"] += size
            elif "maybe-live-out" in words:
                sizes["results"] += size
            elif "preallocated-temp" in words:
                sizes["temporaries"] += size
    return sizes


def main(folder: str) -> None:
    """In a process of its own: compiles the step of FOLDER/config.json; CPU_FLAGS say the rest."""
    path = pathlib.Path(folder) / "config.json"
    # What comes out of a cache is not laid out again.
    jax.config.update("jax_enable_compilation_cache", False)
    trainer = Trainer(config_lib.from_json(path.read_text("utf-8"), str(path)))
    compile_step(trainer)


if __name__ == "__main__":
    main(*sys.argv[1:])
