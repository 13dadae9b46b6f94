"""The page's handlers: sessions apart, a way through the page, what comes late or is forged."""

from __future__ import annotations

import asyncio
import json
import threading

import pytest

pytest.importorskip("gradio", reason="needs the extra 'ui'")

import gradio as gr
import numpy as np

from kaleido_jax.errors import UserError
from kaleido_jax.latents import png_bytes
from kaleido_jax.ui import worker
from kaleido_jax.ui.handlers import Handlers
from kaleido_jax.ui.studio import Engine, Studio
from tests.test_constrained import COMBINED, PROMPT, pipeline


def someone(name):
    return gr.Request(session_hash=name)


async def last(updates):
    return [found async for found in updates][-1]


@pytest.fixture(scope="module")
def studio():
    made = Studio([Engine(pipeline(COMBINED))], warm=False)
    yield made
    made.pool.close()


@pytest.fixture
def handlers(studio, tmp_path):
    return Handlers(studio, tmp_path)


async def draw(handlers, name, caption=PROMPT, number=1, seed=0):
    asked = handlers.create(someone(name), caption, number, None, None, None, None, seed)
    return await last(asked)


def current(handlers, name):
    return handlers._session(someone(name)).now()


async def edited(handlers, name, redraw=(), noise=None, **strings):
    """Edits as from the page: the boxes hold the current strings where nothing else is said."""
    document = current(handlers, name).document
    editor = (await handlers.load(someone(name)))[0]["value"]
    caption = strings.get("caption", document.caption)
    boxes = [strings.get(latent, document.latents[latent]) for latent in COMBINED]
    editor = strings.get("editor", editor)
    asked = handlers.edit(
        someone(name), editor, list(redraw), noise is not None, noise, caption, *boxes
    )
    return (await last(asked))[0]


@pytest.mark.parametrize("users", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_people_do_not_see_each_other(handlers, users):
    captions = {f"user {i} of {users}": f"{PROMPT}, number {i}" for i in range(users)}

    async def everybody():
        await asyncio.gather(
            *[
                draw(handlers, name, caption, 1, i)
                for i, (name, caption) in enumerate(captions.items())
            ]
        )

    asyncio.run(everybody())
    for name, caption in captions.items():
        pictures = handlers._session(someone(name)).pictures
        assert [picture.document.caption for picture in pictures] == [caption]
        strip = asyncio.run(handlers.load(someone(name)))[-1]
        assert caption in strip and strip.count("<li") == 1
    with pytest.raises(UserError, match="no session"):
        handlers._session(gr.Request())


def test_a_way_through_the_page(handlers, tmp_path):
    async def way():
        status, cards, *_ = await draw(handlers, "way", number=2)
        assert "Done" in status and cards.count("data-pick") == 2
        status = await edited(handlers, "way", caption="dusk: a blue shape")
        assert "Done" in status and current(handlers, "way").parent == 0

        # Dragged: the editor is newer than the text box, unless that was typed in since.
        document = current(handlers, "way").document
        state = json.loads((await handlers.load(someone("way")))[0]["value"])
        box = state["latents"]["bbox"]["parts"][0]["boxes"][0]
        box[:] = [1, 2, 300, 400]
        state["rev"] = 1
        status, echo, string = await handlers.moved(json.dumps(state))
        assert "(1, 2, 300, 400)" in string and json.loads(echo)["rev"] == 1
        assert json.loads(echo)["latents"]["bbox"]["base"] == string
        await edited(handlers, "way", editor=json.dumps(state))
        assert current(handlers, "way").document.latents["bbox"] == string
        typed = string.replace("(1, 2, 300, 400)", "(5, 6, 700, 800)")
        state["picture"] = current(handlers, "way").number
        await edited(handlers, "way", editor=json.dumps(state), bbox=typed)
        assert current(handlers, "way").document.latents["bbox"] == typed
        echo = json.loads(await handlers.typed(json.dumps(state), typed))
        assert echo["latents"]["bbox"]["parts"][0]["boxes"][0] == [5, 6, 700, 800]
        assert "<ins>" in await handlers.marks(
            someone("way"), "another", *[document.latents[n] for n in COMBINED]
        )

        status, *_ = await handlers.undo(someone("way"))
        assert "Picture 3." in status
        status, *_ = await handlers.redo(someone("way"))
        assert "Picture 4." in status
        await edited(handlers, "way", redraw=["text"], noise=7)
        now = current(handlers, "way")
        assert now.document.seed == 7 and now.document.decoding["resampled"] == ["text"]
        status, string = await handlers.take_vokens(someone("way"), 1)
        assert string == handlers._session(someone("way")).pictures[1].document.latents["voken"]

        path = tmp_path / "mine.png"
        path.write_bytes(png_bytes(now.image, now.document))
        await draw(handlers, "other")
        status, *_ = await handlers.open(someone("other"), str(path))
        assert "Opened as picture 1" in status
        assert current(handlers, "other").document == now.document
        status, link = await handlers.pack(someone("other"))
        assert "kaleido-session.zip (2 pictures)" in link
        await handlers.clear(someone("other"))
        status, link = await handlers.pack(someone("other"))
        assert "no picture yet" in status

    asyncio.run(way())


def test_what_ends_late_disturbs_nothing(handlers):
    async def late():
        await draw(handlers, "late", number=2)
        session = handlers._session(someone("late"))
        image, document = session.pictures[1].image, session.pictures[1].document
        editor = (await handlers.load(someone("late")))[0]["value"]
        strings = [session.now().document.latents[name] for name in COMBINED]

        def edit(caption):
            return handlers.edit(someone("late"), editor, [], False, None, caption, *strings)

        # An edit, the page back at its parent, and what the page held before that came.
        assert "Done" in (await last(edit("a dog")))[0]
        assert "turned to picture 2" in (await last(edit("a cat")))[0]
        await handlers.undo(someone("late"))
        # What somebody has begun stays when new pictures come.
        assert "<ins>" in await handlers.marks(someone("late"), "a cat", *strings)
        status, _, *shown = await draw(handlers, "late")
        assert "picture 0 is kept" in status and session.current == 0
        assert shown[:-1] == [gr.skip()] * len(shown[:-1]) and "<b>3</b>" in shown[-1]
        assert await handlers.marks(someone("late"), session.now().document.caption, *strings) == ""
        status, *_ = await draw(handlers, "late")
        assert "kept" not in status and session.current == 4
        session.go(0)
        # The history is emptied, and another picture stands where the parent was.
        asked = edit("a cat")
        await anext(asked)
        session.clear()
        session.add_opened(image, document)
        assert "not in your history any more" in (await last(asked))[0]
        assert len(session.pictures) == 1
        asked = edit("a cat")
        await anext(asked)
        await handlers.clear(someone("late"))
        await last(asked)
        assert not session.pictures

    asyncio.run(late())


def test_a_preview_is_sent_once(handlers, studio):
    preview, gates = np.zeros((1, 8, 8, 3), np.uint8), [threading.Event(), threading.Event()]

    def job(engine, tell):
        for step, gate in enumerate(gates, 1):
            tell(worker.Report("drawing", step, 2, preview))
            assert gate.wait(60)

    async def follow():
        found = []
        async for status, shown in handlers._follow(studio.pool.submit(job, "a")):
            found.append(shown)
            for step, gate in enumerate(gates, 1):
                if f"step {step} of 2" in status:
                    gate.set()
        return found

    found = asyncio.run(follow())
    assert ["<img" in str(shown) for shown in found].count(True) == 1
    assert found[-1] == gr.skip()


@pytest.mark.parametrize(
    "values",
    [
        ("x" * 2**20, 1, None, None, None, None, 0),
        (PROMPT, 1, float("nan"), None, None, None, 0),
        (PROMPT, 1, None, 10**9, None, None, 0),
        (PROMPT, 10**9, None, None, None, None, 0),
        (PROMPT, 1, None, None, "../../etc/passwd", None, 0),
        (None, None, None, None, None, None, None),
    ],
    ids=["caption", "guidance", "steps", "number", "sampler", "nothing"],
)
def test_what_is_out_of_bounds_never_reaches_the_queue(handlers, studio, values, monkeypatch):
    monkeypatch.setattr(studio.pool, "submit", None)
    found = asyncio.run(last(handlers.create(someone("a"), *values)))
    assert 'class="k-error" role="alert"' in found[0]


def test_forged_events_are_told_not_raised(handlers):
    async def forged():
        await draw(handlers, "forger")
        for editor in (None, "[]", '{"latents": 1}', '{"latents": {"text": {}}}', "x" * 2**18):
            assert "alert" in await edited(handlers, "forger", editor=editor)
            assert "alert" in (await handlers.moved(editor))[0]
        bad = '{"latents": {"bbox": {"base": "x", "parts": [{"phrase": 1, "boxes": []}]}}}'
        assert "alert" in (await handlers.moved(bad))[0]
        assert "alert" in await edited(handlers, "forger", redraw=[["text"]])
        assert "alert" in (await handlers.open(someone("forger"), "/etc/passwd"))[0]
        assert "alert" in (await handlers.take_vokens(someone("forger"), 10**9))[0]
        strings = [current(handlers, "forger").document.latents[name] for name in COMBINED]
        marks = await handlers.marks(someone("forger"), ". " * 5_000, *strings)
        assert "caption: must be a text of at most 2,000 characters" in marks
        event = gr.EventData(None, {"number": "0"})
        assert "alert" in (await handlers.pick(someone("forger"), event))[1]
        compared = handlers.compare(someone("forger"), PROMPT, 1, "1,2", 0)
        assert "no baseline" in (await last(compared))[0]

    asyncio.run(forged())
