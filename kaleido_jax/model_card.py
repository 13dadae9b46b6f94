"""The README.md of an export: front matter for model hubs, then what it is and how to run it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

TASK = "text-to-image"


def model_card(config: ConfigDict, parts: Mapping[str, int], made_from: str, dtype: str) -> str:
    """Markdown with YAML front matter.

    Args:
      config: of the model.
      parts: parameters of each part by its name.
      made_from: the hash of the checkpoint, or the name of the file that was imported.
      dtype: of the weights.
    """
    latents = ", ".join(config.latents) or "none: the diffusion model alone"
    rows = [f"| `{name}` | {count:,} |" for name, count in parts.items()]
    sample = config.sample
    settings = f"{sample.sampler}, {sample.steps} steps, guidance weight {sample.guidance_weight:g}"
    return "\n".join(
        [
            *_front_matter(config),
            "# Kaleido diffusion model",
            "",
            "A text-to-image model of `kaleido_jax`: an autoregressive decoder first draws",
            "discrete latents, then the diffusion model draws the picture that they describe.",
            "",
            f"- Latents: {latents}",
            f"- Pictures: {config.data.image_size} x {config.data.image_size} pixels",
            f"- Sampling by default: {settings}",
            f"- Weights: {dtype}, made from `{_plain(made_from)}`",
            "",
            "| part | parameters |",
            "|---|---|",
            *rows,
            "",
            "```python",
            "from kaleido_jax import Pipeline",
            "",
            'pipe = Pipeline.from_pretrained("this folder, or its name on the hub")',
            'out = pipe("a caption", num_images=4, seed=0)',
            "out.images, out.documents",
            "```",
            "",
            "`config.json` holds the whole config, `manifest.json` a SHA-256 of each file.",
            "What the model was trained on, its license and its limits are for its owner to add.",
            "",
        ]
    )


def _front_matter(config: ConfigDict) -> list[str]:
    tags = ["kaleido", "diffusion", "jax", "flax", *(f"latent-{name}" for name in config.latents)]
    return [
        "---",
        "library_name: kaleido_jax",
        f"pipeline_tag: {TASK}",
        "tags:",
        *(f"- {tag}" for tag in tags),
        "---",
        "",
    ]


def _plain(text: Any) -> str:
    """What cannot close the code span that it stands in, nor start a line."""
    return "".join(c for c in str(text) if c.isprintable() and c != "`")[:200]
