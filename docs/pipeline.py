# %% [markdown]
# # The pipeline from Python
#
# A notebook in the percent format: editors and Jupyter (with jupytext) open it cell by cell, and
# `python docs/pipeline.py` runs it whole, on a CPU in about a minute. It uses a small trained model
# that comes with the package; in its place any workdir, export or model on a hub will do.

# %%
from __future__ import annotations

import pathlib
import tempfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np

import kaleido_jax
from kaleido_jax import LatentDocument, Pipeline

model = pathlib.Path(kaleido_jax.__file__).parent / "assets" / "shapes_kaleido"
pipe = Pipeline.from_pretrained(model)
print("latents:", pipe.names, "- steps by default:", pipe.defaults.num_steps)

# %% [markdown]
# A prompt gives pictures and, for each, a document: the latents that the decoder drew for it.
# Picture i depends on the model, the prompt, the seed and i alone.

# %%
steps = {"num_steps": 8, "sampler": "ddim"}
out = pipe("dawn: a red shape", num_images=3, seed=1, guidance_weight=4.0, **steps)
assert out.images.shape == (3, 32, 32, 3) and out.images.dtype == np.uint8
for document in out.documents:
    print(document.latents["bbox"], f"log p(z|c) = {document.log_prob:.1f}")

# %% [markdown]
# Latents can be drawn alone, read, changed, and then rendered: the same noise, another picture.

# %%
documents: list[LatentDocument] = pipe.draw_latents("dusk: a blue shape", num_images=2, seed=4)
moved = documents[0].replace(bbox="a dark blue disc (100, 100, 500, 500) on white")
before, after = pipe.render([documents[0], moved], **steps).images
assert (before != after).any()

# %% [markdown]
# A document is JSON, and enough to make its picture again.

# %%
again = LatentDocument.from_json(out.documents[0].to_json())
assert (pipe.render(again, batch_size=3).images[0] == out.images[0]).all()

# %% [markdown]
# One pipeline serves several threads: it holds no state that a call changes.

# %%
with ThreadPoolExecutor(2) as pool:
    jobs = [pool.submit(pipe, "a shape", 1, seed=seed, **steps) for seed in range(4)]
    pictures = np.concatenate([job.result().images for job in jobs])
alone = pipe("a shape", 1, seed=3, **steps).images[0]
assert (pictures[3] == alone).all()

# %% [markdown]
# An export is one folder that needs neither a checkpoint nor the training libraries.

# %%
with tempfile.TemporaryDirectory() as scratch:
    folder = pipe.save_pretrained(pathlib.Path(scratch) / "shapes", dtype="float16")
    print(sorted(path.name for path in folder.iterdir()))
    copy = Pipeline.from_pretrained(folder)
    same = copy("dawn: a red shape", num_images=3, seed=1, guidance_weight=4.0, **steps)
    assert (same.images == out.images).all()
