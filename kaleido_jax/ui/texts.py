"""What the page says: introduction, examples, the about box."""

from __future__ import annotations

from collections.abc import Sequence

from ml_collections import ConfigDict

TITLE = "Kaleido: edit what it is going to draw"

INTRODUCTION = """# Kaleido
A small language model first writes down what is going to be drawn. Read it, change it, and see the
picture change."""

LIMITS = """### What this can do, and what it cannot
This is a research model. It draws pictures that are more varied than those of a diffusion model
alone, which helps art, teaching and design, and shows more of what a caption can mean. It does not
make anything true, and varied is not the same as fair: what it draws mirrors the pictures it
learned from, with their gaps and their prejudices.

- Do not take a picture for evidence, and do not pass one off as a photograph.
- Do not draw real people without their consent, or what harms or deceives others.
- Look at many pictures before you say what a model tends to draw.
- An edit is a wish: the model follows it as well as it has learned to, and other parts may change.

Every picture that you save has its document inside, which says how it was made. The server keeps
your pictures in memory only, for this visit, and sends nothing to anybody else."""

API = """### From a program
`pip install gradio_client`, then

```python
import base64

from gradio_client import Client

client = Client("http://127.0.0.1:7860/")  # with a token: auth=("kaleido", TOKEN)
drawn = client.predict(caption="dawn: a red shape", number=2, api_name="/create")
open("picture.png", "wb").write(base64.b64decode(drawn["pictures"][0]["png"]))
document = drawn["pictures"][0]["document"]
step = [["set", "caption=dusk: a red shape"]]
edited = client.predict(document=document, step=step, api_name="/edit")
```

`docs/page.md` lists all arguments."""

_SHAPES = (
    "dawn: a red shape and a blue shape",
    "night: a green shape",
    "noon: a purple shape and a yellow shape",
    "dusk: an orange shape and a cyan shape",
)
_GENERAL = (
    "A frog sitting on a log beside the water.",
    "A dog resting its head on somebody's lap.",
    "Two cups of coffee on a wooden table.",
)


def examples(config: ConfigDict) -> Sequence[str]:
    """Captions of the kind that the model has learned."""
    return _SHAPES if config.data.source.name == "shapes" else _GENERAL


def model_card(config: ConfigDict, checkpoint: str, compares: bool) -> str:
    """What model this is, as Markdown.

    Args:
      checkpoint: its hash.
      compares: whether a baseline stands beside it.
    """
    s = config.sample
    size = config.data.image_size
    return "\n".join(
        [
            "### This model",
            f"- Writes: {', '.join(config.latents) or 'nothing; it is a baseline'}",
            f"- Draws: {size} x {size} pixels, trained on `{config.data.source.name}`",
            f"- By default: {s.sampler}, {s.steps} steps, guidance weight {s.guidance_weight:g}",
            f"- Checkpoint: `{checkpoint[:16] or 'unknown'}`",
            f"- Baseline to compare with: {'yes' if compares else 'no'}",
        ]
    )
