"""What is asked of vision-language models: Table 1 of the paper, word for word, and one of ours."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

# Table 1 prints ";PERSON;" where CC12M writes "<PERSON>"; kept as printed.
CAPTION = """\
Original caption: {}

Using the information provided in the caption above, Please provide a detailed description of the \
image in 50-80 words, incorporating relevant information from the caption and expanding on the \
visual elements:

- Include names, objects, events, and locations mentioned in the caption
- Do not include placeholders like ;PERSON; in the caption
- Describe people, characters, animals, and notable entities
- Mention the setting, background, and overall environment
- Note colors, lighting, composition, and style aspects
- Refer to any text, symbols, or logos in the image

Combine caption details with your observations to create a comprehensive description of the key \
elements and overall scene, focusing on the most salient aspects of the image."""

LABEL = """\
Object labels: {}

Using the provided object labels, generate a detailed description of the image in 50-80 words, \
incorporating the relevant information about prominent objects identified and expanding on the \
visual elements:

- Describe each labeled object, including its size, shape, and placement in the scene
- Depict relations between objects, such as proximity or arrangement
- Highlight interactions or functions implied by the objects
- Describe the surrounding environment or context that complements the labeled objects
- Any notable features or characteristics of the objects, like color, texture, or design elements
- Describe people, characters, animals, and notable entities
- Mention the setting, background, and overall environment
- Note colors, lighting, composition, and style aspects
- Refer to any text, symbols, or logos in the image

Craft a comprehensive depiction of the scene based on the identified objects, utilizing both the \
labels and contextual observations to enrich the description."""

GROUNDING = "Generate the caption in English with grounding:"

# Ours: Qwen2.5-VL and later write boxes as JSON and have no caption with boxes of its own.
GROUNDING_JSON = """\
First write one English sentence that describes the image and names its main objects. Then, on a \
new line, locate those objects and output a JSON list in which each item has the form \
{"bbox_2d": [x1, y1, x2, y2], "label": "words"}. Every label must be copied word for word from \
the sentence."""

STYLES = ("auto", "caption", "label")
_CONTROL = re.compile(r"<\|[^<>|]{0,40}\|>|</?(?:img|ref|box|quad|s|pad)>")


def description_prompt(caption: str, metadata: Mapping[str, Any], style: str = "auto") -> str:
    """The prompt of Table 1 for a description, with the caption or the labels filled in.

    Args:
      caption: the original caption.
      metadata: the record's JSON; its `label` fills the prompt for labels.
      style: `caption`, `label`, or `auto`: for labels where the JSON has one as a string (a
        class-labelled set, whose captions are made from the labels anyway), else for captions.
    """
    label = metadata.get("label")
    labelled = isinstance(label, str) and bool(label.strip())
    if style == "label" or (style == "auto" and labelled):
        return LABEL.format(_plain(label if labelled else caption))
    return CAPTION.format(_plain(caption))


def sha256(*parts: str) -> str:
    """Hex digest of the prompts that an engine may use."""
    return hashlib.sha256("\n\n".join(parts).encode()).hexdigest()


def _plain(words: str) -> str:
    # A caption from the web must not write the model's own control tokens.
    return " ".join(_CONTROL.sub(" ", words).split())
