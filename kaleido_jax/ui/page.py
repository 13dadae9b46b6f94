"""The page's components and which handler each event calls."""

from __future__ import annotations

import pathlib

import gradio as gr

from kaleido_jax.samplers import SAMPLERS
from kaleido_jax.ui import bounds, show, texts
from kaleido_jax.ui.api import add_endpoints
from kaleido_jax.ui.handlers import Handlers
from kaleido_jax.ui.studio import Studio

STATIC = pathlib.Path(__file__).resolve().parent / "static"
# Uploads are read at once; what is left of them goes after ten minutes.
_DELETE_CACHE = (600, 600)
_LABELS = {
    "text": "Description",
    "bbox": "Boxes: phrase, then (x1, y1, x2, y2)",
    "blob": "Ellipses: phrase, then (xc, yc, r_major, r_minor, theta)",
    "voken": "Visual tokens: 32 ids",
    "combined": "All latents in one",
}
_SAVE = "() => setTimeout(() => document.querySelector('#k-archive a')?.click(), 200)"


def static(name: str) -> str:
    """A file of the folder `static`."""
    return (STATIC / name).read_text("utf-8")


def theme() -> gr.themes.Base:
    """Gradio's plain theme with the fonts of the reader's system: nothing comes from elsewhere."""
    return gr.themes.Default(
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )


def picks(**options: object) -> gr.HTML:
    """HTML whose buttons can name a picture."""
    return gr.HTML("", js_on_load=static("pick.js"), **options)


class Page:
    """Builds the page.

    Attributes:
      blocks: the page itself.
      shown: the components that show the current picture (see `Handlers.view`).
    """

    def __init__(self, studio: Studio, handlers: Handlers):
        """Args: what the page is of, and its handlers."""
        self._studio, self._on = studio, handlers
        with gr.Blocks(
            title=texts.TITLE, analytics_enabled=False, delete_cache=_DELETE_CACHE
        ) as self.blocks:
            add_endpoints(studio)
            gr.Markdown(texts.INTRODUCTION)
            with gr.Tabs() as self._tabs:
                with gr.Tab("Create", id="create"):
                    self._create_tab()
                with gr.Tab("Edit", id="edit"):
                    self._edit_tab()
                with gr.Tab("History", id="history"):
                    self._history_tab()
                if studio.can_compare:
                    with gr.Tab("Compare", id="compare"):
                        self._compare_tab()
                with gr.Tab("About", id="about"):
                    card = texts.model_card(studio.config, studio.checkpoint, studio.can_compare)
                    for words in (card, texts.LIMITS, texts.API):
                        gr.Markdown(words)
            self.shown = [
                self._editor,
                self._caption,
                *self._strings,
                self._marks,
                self._redraw,
                self._vokens,
                self._slider,
                self._strip,
            ]
            self._connect()

    # ---- the tabs ---------------------------------------------------------------------------

    def _create_tab(self) -> None:
        defaults = self._studio.defaults
        captions = list(texts.examples(self._studio.config))
        with gr.Row():
            with gr.Column(min_width=280):
                caption = gr.Textbox(
                    captions[0], label="Caption", lines=2, max_length=2000, elem_id="k-caption"
                )
                number = gr.Slider(
                    1,
                    bounds.MAX_NUMBER,
                    bounds.BATCH,
                    step=1,
                    label="Number of pictures",
                    elem_id="k-number",
                )
                with gr.Accordion("More settings", open=False):
                    guidance = gr.Number(
                        defaults.guidance_weight, label="Guidance weight, 0 to 50 (1 is none)"
                    )
                    steps = gr.Number(
                        defaults.num_steps,
                        label=f"Denoising steps, 1 to {bounds.MAX_STEPS}",
                        precision=0,
                    )
                    sampler = gr.Dropdown(list(SAMPLERS), value=defaults.sampler, label="Sampler")
                    temperature = gr.Number(
                        defaults.temperature, label="Temperature of the latents, 0 to 5"
                    )
                    seed = gr.Number(0, label="Seed", precision=0)
                with gr.Row():
                    button = gr.Button("Draw", variant="primary", elem_id="k-draw")
                    cancel = gr.Button("Cancel", elem_id="k-cancel")
                gr.Examples([[words] for words in captions], inputs=caption, label="Examples")
            with gr.Column(scale=2, min_width=300):
                self._status = gr.HTML("", elem_id="k-status")
                self._cards = picks(elem_id="k-cards")
        self._created = (
            button,
            cancel,
            [caption, number, guidance, steps, sampler, temperature, seed],
        )

    def _edit_tab(self) -> None:
        with gr.Row():
            with gr.Column(min_width=300):
                self._editor = gr.HTML(
                    "",
                    html_template=static("editor.html"),
                    js_on_load=static("editor.js"),
                    image="",
                    palette=show.palette(),
                    apply_default_css=False,
                    elem_id="k-editor",
                )
                self._vokens = gr.HTML("", elem_id="k-vokens")
            with gr.Column(min_width=300):
                self._edit_status = gr.HTML(show.note("Draw or open a picture first."))
                self._slider = picks(elem_id="k-slider")
                with gr.Row():
                    again = gr.Button(
                        "Draw again", variant="primary", elem_id="k-again", min_width=100
                    )
                    cancel = gr.Button("Cancel", min_width=100)
                with gr.Row():
                    undo = gr.Button("Undo", elem_id="k-undo", min_width=100)
                    redo = gr.Button("Redo", min_width=100)
                self._caption = gr.Textbox(
                    label="Caption", lines=2, max_length=2000, interactive=False
                )
                self._strings = [
                    gr.Textbox(label=_LABELS[name], lines=2, interactive=False, elem_id=f"k-{name}")
                    for name in self._studio.names
                ]
                self._marks = gr.HTML("", elem_id="k-marks")
                self._redraw = gr.CheckboxGroup(
                    list(self._studio.names),
                    label="Draw anew (the others are kept)",
                    visible=bool(self._studio.names),
                )
                with gr.Row():
                    other = gr.Checkbox(False, label="Other noise")
                    noise = gr.Number(1, label="Seed of other noise", precision=0)
                if "voken" in self._studio.names:
                    with gr.Row():
                        source = gr.Number(0, label="Take the vokens of picture", precision=0)
                        take = gr.Button("Take")
                    voken = self._strings[self._studio.names.index("voken")]
                    take.click(
                        self._on.take_vokens,
                        source,
                        [self._edit_status, voken],
                        api_visibility="private",
                    )
                    voken.change(
                        show.vokens,
                        voken,
                        self._vokens,
                        trigger_mode="always_last",
                        api_visibility="private",
                        show_progress="hidden",
                    )
        self._edited = (again, cancel, undo, redo, other, noise)

    def _history_tab(self) -> None:
        self._history_status = gr.HTML("", elem_id="k-history-status")
        self._strip = picks(elem_id="k-strip")
        with gr.Row():
            pack = gr.Button("Save the session", elem_id="k-pack")
            clear = gr.Button("Empty the history")
        self._archive = gr.HTML("", elem_id="k-archive")
        upload = gr.File(
            label="Go on from one of our PNG files",
            file_types=[".png"],
            type="filepath",
            elem_id="k-upload",
            height=140,
        )
        self._kept = (pack, clear, upload)

    def _compare_tab(self) -> None:
        captions = list(texts.examples(self._studio.config))
        with gr.Row():
            caption = gr.Textbox(captions[0], label="Caption", max_length=2000)
            weights = gr.Textbox("1, 2, 4, 8", label="Guidance weights, up to four")
        with gr.Row():
            number = gr.Slider(1, bounds.BATCH, bounds.BATCH, step=1, label="Pictures of each")
            seed = gr.Number(0, label="Seed", precision=0)
        with gr.Row():
            button = gr.Button("Compare", variant="primary", elem_id="k-compare")
            cancel = gr.Button("Cancel")
        status, table = gr.HTML(""), gr.HTML("", elem_id="k-table")
        button.click(
            self._on.compare,
            [caption, number, weights, seed],
            [status, table],
            api_visibility="private",
            concurrency_limit=None,
            show_progress="hidden",
        )
        cancel.click(self._on.cancel, None, status, api_visibility="private", queue=False)

    # ---- events -----------------------------------------------------------------------------

    def _connect(self) -> None:
        quiet = {"api_visibility": "private", "show_progress": "hidden"}
        long = {**quiet, "concurrency_limit": None}
        on, shown = self._on, self.shown

        button, cancel, settings = self._created
        gr.on(
            [button.click, settings[0].submit],
            on.create,
            settings,
            [self._status, self._cards, *shown],
            **long,
        )
        cancel.click(on.cancel, None, self._status, queue=False, **quiet)

        again, cancel, undo, redo, other, noise = self._edited
        again.click(
            on.edit,
            [self._editor, self._redraw, other, noise, self._caption, *self._strings],
            [self._edit_status, self._slider, *shown],
            **long,
        )
        cancel.click(on.cancel, None, self._edit_status, queue=False, **quiet)
        undo.click(on.undo, None, [self._edit_status, *shown], **quiet)
        redo.click(on.redo, None, [self._edit_status, *shown], **quiet)

        grounded = [self._strings[self._studio.names.index(name)] for name in on.grounded()]
        self._editor.moved(
            on.moved,
            self._editor,
            [self._edit_status, self._editor, *grounded],
            trigger_mode="always_last",
            **quiet,
        )
        if grounded:
            gr.on(
                [box.input for box in grounded],
                on.typed,
                [self._editor, *grounded],
                self._editor,
                trigger_mode="always_last",
                **quiet,
            )
        gr.on(
            [box.change for box in (self._caption, *self._strings)],
            on.marks,
            [self._caption, *self._strings],
            self._marks,
            trigger_mode="always_last",
            **quiet,
        )

        for html in (self._cards, self._strip):
            html.pick(on.pick, None, [self._tabs, self._edit_status, *shown], **quiet)
        pack, clear, upload = self._kept
        upload.upload(on.open, upload, [self._history_status, *shown], **quiet)
        clear.click(on.clear, None, [self._history_status, self._cards, *shown], **quiet)
        pack.click(on.pack, None, [self._history_status, self._archive], **quiet).success(
            None, None, None, js=_SAVE, api_visibility="private"
        )
        self.blocks.load(on.load, None, shown, **quiet)
        self.blocks.unload(on.left)
