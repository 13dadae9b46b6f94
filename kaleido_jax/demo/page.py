"""The demo's page: what was claimed, what came out, and how it was made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kaleido_jax.demo import markup
from kaleido_jax.demo.checks import Check
from kaleido_jax.demo.control import CHANCE

NAMES = {"baseline": "baseline", "kaleido": "Kaleido"}
NOT_ALIKE = (
    "They were not trained alike, as docs/reproduction.md says, so what differs between them need "
    "not be due to the latents alone."
)


def build(results: dict[str, Any], checks: Sequence[Check], panels: Sequence[dict]) -> str:
    """The page as HTML; everything it names lies beside it.

    Args:
      results: what results.json holds.
      checks: claims and measurements.
      panels: from shapes_figure.panels.
    """
    parts = [
        *_opening(results, checks),
        *_toy(results["toy"]),
        *_shapes(results["shapes"], panels),
        *_scratch(results["scratch"]),
        *_making(results),
    ]
    return markup.document("Kaleido demo", "\n".join(parts))


def _opening(results: dict[str, Any], checks: Sequence[Check]) -> list[str]:
    said = [
        markup.heading("Kaleido: choose what to draw, then draw it", 1),
        markup.paragraph(
            "Guidance makes a diffusion model's pictures clear and makes them alike: it drops the "
            "rarer ways to draw a caption. Kaleido lets a small language model first write down "
            "what to draw (a latent z), and guides only the drawing. Below, both models are the "
            "same code with and without z."
        ),
    ]
    if results["quick"]:
        return [
            *said,
            markup.paragraph(
                "This was a quick run (--quick): a few steps of everything show that it runs. Its "
                "numbers mean nothing, so no claim is judged."
            ),
        ]
    return [*said, markup.heading("What was claimed, and what was measured"), _checks(checks)]


def _checks(checks: Sequence[Check]) -> str:
    items = "".join(
        f'<li class="{"good" if c.passed else "bad"}"><b>{markup.text(c.verdict)}</b> · '
        f"{markup.text(c.claim)}: {markup.text(c.numbers())}</li>"
        for c in checks
    )
    return f'<ul class="checks">{items}</ul>'


def _toy(toy: dict[str, Any]) -> list[str]:
    weights = [f"guidance {w:g}" for w in toy["weights"]]
    groups = []
    for name in dict.fromkeys(row["class"] for row in toy["shares"]):
        rows = []
        for model in dict.fromkeys(r["model"] for r in toy["shares"] if r["model"] != "data"):
            for mode in dict.fromkeys(row["mode"] for row in toy["shares"]):
                found = {
                    (r["model"], r["guidance"]): r["share"]
                    for r in toy["shares"]
                    if r["class"] == name and r["mode"] == mode
                }
                cells = [found["data", None], *(found[model, w] for w in toy["weights"])]
                rows.append((f"{NAMES[model]}, {mode}", [f"{c:.1%}" for c in cells], False))
        groups.append((name, rows))
    return [
        markup.heading("1 · Two classes, two modes each (Figure 3)"),
        markup.paragraph(
            f"Both models were trained here from scratch, {toy['steps']:,} steps of "
            f"{toy['batch_size']} points. The condition is the class (the colour); each class has "
            "a common mode of its own and a rarer one beside the other class's. Kaleido's latent "
            "names the mode. Crosses mark the centres of the modes, numbers their shares of the "
            "class's samples."
        ),
        markup.picture(
            "toy.png",
            "Points of both classes: the data, then samples at rising guidance. Upper row, the "
            "baseline; lower row, Kaleido. The table below has the shares of all modes.",
            860,
        ),
        markup.table(
            f"Share of each mode among {toy['samples']} samples of its class.",
            ["class", "model, mode", "data", *weights],
            groups,
        ),
        markup.links("Files:", ["toy.svg", "toy.csv"]),
    ]


def _shapes(shapes: dict[str, Any], panels: Sequence[dict]) -> list[str]:
    settings, weights = shapes["settings"], shapes["weights"]
    each, captions = settings["samples_per_caption"], shapes["captions"]
    return [
        markup.heading("2 · Shapes at 32 pixels (Figures 1 and 7)"),
        markup.paragraph(
            "A caption names the colours of two shapes and a theme (dawn, noon, dusk, night). The "
            "theme only says how likely each layout, background and shape is, so the right answer "
            "is known. Both models were trained beforehand with this package and ship with it; "
            f"their pictures were drawn just now, {settings['num_steps']} steps of "
            f"{settings['sampler']} each, with the same settings for both."
            + ("" if settings["trained_alike"] else f" {NOT_ALIKE}")
        ),
        markup.picture(
            "shapes.png",
            "Pictures of three captions in columns of rising guidance, a row of the baseline's "
            "and a row of Kaleido's for each caption.",
            860,
            "Not picked: the first pictures of each caption.",
        ),
        markup.heading("What Kaleido wrote before it drew", 3),
        markup.paragraph(
            "The latent is a grounded caption: phrases with boxes, here drawn on the finished "
            f"pictures. Guidance {shapes['panel_weight']:g}."
        ),
        markup.panels(
            [
                (
                    item["file"],
                    f"Picture for “{item['caption']}” with its latents: "
                    + "; ".join(f"{k}: {v}" for k, v in item["latents"].items()),
                    item["caption"],
                )
                for item in panels
            ]
        ),
        markup.table(
            "How far Kaleido's pictures show what it wrote, as read by a detector: shares, and the "
            "overlap of boxes. What blind guessing reaches stands beside.",
            ["", "", *(f"guidance {w:g}" for w in weights)],
            [("as written", _followed(shapes["followed"]))],
        ),
        markup.heading("How many modes are left", 3),
        markup.paragraph(
            "The effective number of modes is exp(entropy): 4 equally likely layouts count 4, one "
            f"layout always counts 1. {each} pictures of each of {len(captions)} captions "
            f"({each * len(captions)} per model and guidance weight) were read back by a detector; "
            "each caption's modes are counted for itself, then averaged (shapes and shades: each "
            "object for itself). Few pictures show fewer modes than there are, so every number, "
            "the data's and the theory's included, is of subsets of the same size; the true number "
            "stands beside. Theory without z: ideal guidance, p(m) (p(m|c) / p(m))^γ over whole "
            "pictures (Eq. 6). Theory with z: the data at every weight. Shades are free of the "
            "caption, so guidance has no reason to narrow them."
        ),
        markup.picture(
            "coverage.png",
            "Effective number of modes over guidance weight for each factor; the table below has "
            "the numbers.",
            860,
        ),
        markup.table(
            "Effective number of modes; ± is the standard error over captions.",
            ["factor", "", *(f"guidance {w:g}" for w in weights)],
            [_factor(shapes["table"], name) for name in shapes["factors"]],
        ),
        markup.table(
            "Share of pictures that show both objects of their captions to the detector.",
            ["", "model", *(f"guidance {w:g}" for w in weights)],
            [("readable", _readable(shapes["readable"]))],
        ),
        markup.links("Files:", ["coverage.svg", "coverage.csv"]),
    ]


def _factor(table: Sequence[dict], name: str) -> tuple[str, list]:
    rows = [row for row in table if row["factor"] == name]
    first = rows[0]
    label = f"{name.replace(' x ', ' × ')} (of {first['size']} pictures; truly {first['true']:.2f})"

    def measured(model: str) -> list[str]:
        return [f"{row[model]:.2f} ± {row[f'{model}_error']:.2f}" for row in rows]

    return label, [
        ("data", [f"{row['data']:.2f}" for row in rows], False),
        ("theory without z", [f"{row['theory']:.2f}" for row in rows], False),
        ("baseline", measured("baseline"), False),
        ("Kaleido", measured("kaleido"), False),
        ("Kaleido / baseline", [f"{row['ratio']:.2f}" for row in rows], True),
    ]


def _followed(rows: Sequence[dict]) -> list:
    return [
        (f"{name} (blind: {chance:.2f})", [f"{row[name]:.2f}" for row in rows], False)
        for name, chance in CHANCE.items()
    ]


def _readable(rows: Sequence[dict]) -> list:
    models = dict.fromkeys(row["model"] for row in rows)
    return [
        (NAMES[model], [f"{row['readable']:.0%}" for row in rows if row["model"] == model], False)
        for model in models
    ]


def _scratch(scratch: dict[str, Any]) -> list[str]:
    return [
        markup.heading("3 · The same training, begun from scratch"),
        markup.paragraph(
            f"{scratch['steps']} steps of Kaleido on shapes. The checkpoint of step "
            f"{scratch['stop']} was opened by a second run, which went on to the end (rings). "
            "These are far too few steps to learn to draw: the shipped weights took thousands."
        ),
        markup.picture(
            "scratch.png",
            "Denoising loss and latent loss over steps, and the losses of the second run.",
            560,
        ),
        markup.picture(
            "scratch_samples.png",
            f"Pictures sampled after {scratch['steps']} steps.",
            300,
            f"Sampled from the last checkpoint: what {scratch['steps']} steps have learned.",
        ),
        markup.links("Files:", ["scratch.svg", "scratch.csv"]),
    ]


def _making(results: dict[str, Any]) -> list[str]:
    seconds, settings = results["seconds"], dict(results["shapes"]["settings"])
    models = settings.pop("models")
    return [
        markup.heading("How this was made"),
        markup.pairs(
            [
                ("command", results["command"]),
                ("time", ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())),
                ("machine", ", ".join(f"{k} {v}" for k, v in results["machine"].items())),
                ("versions", ", ".join(f"{k} {v}" for k, v in results["versions"].items())),
                ("sampling of shapes", ", ".join(f"{k} {v}" for k, v in settings.items())),
                *(
                    (f"weights, {NAMES[model]}", ", ".join(f"{k} {v}" for k, v in about.items()))
                    for model, about in models.items()
                ),
            ]
        ),
        markup.links("All numbers:", ["results.json"]),
        markup.paragraph(
            "Train them yourself: docs/reproduction.md has the commands.",
            soft=True,
        ),
    ]
