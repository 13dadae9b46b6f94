"""The page without a browser: the queue, sessions and their folders, what is shown."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import threading
import time
import zipfile
from io import BytesIO

import jax
import numpy as np
import pytest

from kaleido_jax import cli, mesh, session_folder
from kaleido_jax.errors import UserError
from kaleido_jax.generate import Pipeline
from kaleido_jax.latents import LatentDocument, png_bytes, read_png
from kaleido_jax.session_folder import Change, Picture
from kaleido_jax.ui import show, studio, worker
from kaleido_jax.ui.bounds import Request
from kaleido_jax.ui.sessions import MAX_PICTURES, Session, Sessions
from tests.test_constrained import COMBINED, PROMPT, pipeline

IMAGE = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
DOCUMENT = LatentDocument("a dog", {"text": "A dog <b>."}, seed=3)
SECONDS = 20.0


class Clock:
    """Seconds that pass when told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def until(event: threading.Event) -> None:
    assert event.wait(60)


def finished(ticket: worker.Ticket) -> worker.View:
    async def follow() -> worker.View:
        async for view in studio.watch(ticket):
            last = view
        return last

    return asyncio.run(follow())


# ---- the queue -------------------------------------------------------------------------------


def test_jobs_run_in_order_and_tell_their_place():
    begun, go = threading.Event(), threading.Event()

    def first(engine, tell):
        begun.set()
        until(go)
        return engine

    pool = worker.Pool(["device"])
    running = pool.submit(first, "a")
    until(begun)
    waiting = [pool.submit(lambda engine, tell, i=i: i, f"user {i}") for i in range(3)]
    assert running.look().state == worker.RUNNING
    assert [t.look().position for t in waiting] == [1, 2, 3] and pool.waiting() == 3
    waiting[0].cancel()
    assert waiting[0].look().state == worker.CANCELLED
    assert [t.look().position for t in waiting[1:]] == [1, 2]
    go.set()
    assert [finished(t).state for t in (running, *waiting[1:])] == [worker.DONE] * 3
    assert [t.result() for t in (running, *waiting[1:])] == ["device", 1, 2]
    with pytest.raises(worker.Stopped):
        waiting[0].result()
    pool.close()


def test_the_queue_is_bounded_and_each_owner_has_one_place():
    begun, go = threading.Event(), threading.Event()

    def block(engine, tell):
        begun.set()
        until(go)

    pool = worker.Pool([None], waiting=2)
    pool.submit(block, "a")
    until(begun)
    with pytest.raises(UserError, match="still running"):
        pool.submit(block, "a")
    pool.submit(block, "b")
    last = pool.submit(block, "c")
    with pytest.raises(UserError, match="2 people are waiting"):
        pool.submit(block, "d")
    pool.forget("c")
    assert last.look().state == worker.CANCELLED
    pool.submit(block, "d")
    go.set()
    pool.close()
    with pytest.raises(UserError, match="stopping"):
        pool.submit(block, "e")


@pytest.mark.parametrize("end", ["cancel", "lease"])
def test_a_job_that_nobody_waits_for_ends_at_its_next_step(end):
    clock, at_two, go = Clock(), threading.Event(), threading.Event()
    steps = []

    def job(engine, tell):
        for step in range(1, 100):
            tell(worker.Report("drawing", step, 100))
            steps.append(step)
            if step == 2:
                at_two.set()
                until(go)

    pool = worker.Pool([None], lease=SECONDS, clock=clock)
    ticket = pool.submit(job, "a")
    after = pool.submit(lambda engine, tell: "next", "b")
    until(at_two)
    clock.now = 2.0
    assert ticket.look().report.done == 2
    clock.now += SECONDS + 1 if end == "lease" else 0
    after.look()
    if end == "cancel":
        ticket.cancel()
    go.set()
    assert finished(after).state == worker.DONE and after.result() == "next"
    assert steps == [1, 2] and ticket.look().state == worker.CANCELLED
    pool.close()


def test_failures_reach_their_owner_and_the_worker_lives_on():
    def fail(engine, tell):
        raise UserError("not like this")

    pool = worker.Pool([None], [lambda engine, tell: 1 / 0])
    ticket = pool.submit(fail, "a")
    assert finished(ticket).state == worker.FAILED
    with pytest.raises(UserError, match="not like this"):
        ticket.result()
    good = pool.submit(lambda engine, tell: 7, "a")
    assert finished(good).state == worker.DONE and good.result() == 7
    pool.close()


def test_warming_up_makes_way_and_goes_on_later():
    begun, go, tries = threading.Event(), threading.Event(), []

    def warm(engine, tell):
        tries.append(engine)
        begun.set()
        until(go)
        tell(worker.Report("compiling"))
        tries.append("warm")

    pool = worker.Pool(["device"], [warm])
    until(begun)
    ticket = pool.submit(lambda engine, tell: list(tries), "a")
    assert not pool.is_warm()
    go.set()
    finished(ticket)
    assert ticket.result() == ["device"]
    end = time.monotonic() + 60
    while not pool.is_warm() and time.monotonic() < end:
        time.sleep(0.01)
    assert tries == ["device", "device", "warm"]
    pool.close()


def test_time_left_follows_the_steps():
    clock, told, go = Clock(), threading.Event(), threading.Event()

    def job(engine, tell):
        tell(worker.Report("drawing", 2, 10))
        clock.now = 4.0
        tell(worker.Report("drawing", 4, 10))
        clock.now = 4.1
        told.set()
        until(go)

    pool = worker.Pool([None], clock=clock)
    ticket = pool.submit(job, "a")
    until(told)
    # Six steps of two seconds; a moment later it is the same view.
    assert ticket.look().seconds_left == 13
    seen = ticket.look()
    clock.now = 4.2
    assert ticket.look() == seen
    go.set()
    finished(ticket)
    pool.close()


# ---- sessions --------------------------------------------------------------------------------


def test_a_session_is_a_tree():
    session = Session("a")
    with pytest.raises(UserError, match="no picture yet"):
        session.now()
    session.add_drawn(np.stack([IMAGE, IMAGE]), [DOCUMENT, DOCUMENT], 4)
    change = Change((("set", "caption=a cat"),))
    assert session.add_edited(1, change, IMAGE, DOCUMENT).number == 2
    session.add_edited(2, change, IMAGE, DOCUMENT)
    assert session.undo().number == 2 and session.undo().number == 1
    with pytest.raises(UserError, match="nothing to undo"):
        session.undo()
    assert session.redo().number == 2
    branch = session.add_edited(session.current, change, IMAGE, DOCUMENT)
    assert (branch.parent, session.depth(4), session.depth(0)) == (2, 2, 0)
    with pytest.raises(UserError, match="nothing to do again"):
        session.redo()
    for number in (-1, 5, "0", 1.0, None, True):
        with pytest.raises(UserError, match="not in your history"):
            session.go(number)
    html = show.strip(session)
    assert html.index("<b>1</b>") < html.index("<b>2</b>") < html.index("<b>3</b>")
    assert html.count("aria-current") == 1 and "<b>." not in html
    session.clear()
    assert not session.pictures and session.current is None


def test_sessions_are_bounded_and_apart():
    clock = Clock()
    sessions = Sessions(limit=2, idle=10.0, clock=clock)
    a = sessions.get("a")
    a.add_opened(IMAGE, DOCUMENT)
    assert sessions.get("b").pictures == [] and sessions.get("a") is a
    sessions.get("c")  # b was unused for longest
    assert len(sessions) == 2 and sessions.get("a") is a
    clock.now = 11.0
    assert sessions.get("c").pictures == [] and len(sessions) == 1
    others = Sessions(limit=3, clock=clock, room=2 * IMAGE.nbytes)
    for key in "abc":
        others.get(key).add_opened(IMAGE, DOCUMENT)
    assert others.get("c").pictures and len(others) == 2  # a made room
    kept = [others.get(key) for key in "bc"]
    for i in range(9):  # somebody who loads the page again and again
        others.get(f"again {i}")
    assert [others.get(key) for key in "bc"] == kept
    others.close("c")
    others.close("again 8")
    assert len(others) == 2
    others.get("b").add_opened(IMAGE, DOCUMENT)
    assert others.get("b") is kept[0] and len(others) == 1  # the closed page was the first to go
    others.get("d").add_opened(IMAGE, DOCUMENT)
    others.close("d")
    assert len(others.get("d").pictures) == 1  # its line was broken
    for key in (None, "", "x" * 201):
        with pytest.raises(UserError, match="no session"):
            sessions.get(key)
    for _ in range(MAX_PICTURES):
        a.add_opened(IMAGE, DOCUMENT)
        if len(a.pictures) == MAX_PICTURES:
            break
    with pytest.raises(UserError, match="history is full"):
        a.add_opened(IMAGE, DOCUMENT)


# ---- a session of the real pipeline, and its folder ------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An export with random weights."""
    return pipeline(COMBINED).save_pretrained(tmp_path_factory.mktemp("run") / "export")


@pytest.fixture(scope="module")
def pipe(run):
    """The export on one device, as the page has it."""
    return Pipeline.from_pretrained(run, mesh.make_mesh(devices=jax.devices()[:1]))


@pytest.fixture(scope="module")
def session(pipe):
    """Drawn, edited twice from one picture, drawn anew in part, with other noise, and opened."""
    pool = worker.Pool([studio.Engine(pipe)])
    found = Session("a")
    request = Request(PROMPT, 2, 5, pipe.defaults)
    ticket = pool.submit(studio.draw_job(request), "a")
    assert finished(ticket).state == worker.DONE
    output = ticket.result()
    direct = pipe(PROMPT, 2, seed=5, batch_size=request.batch_size)
    np.testing.assert_array_equal(output.images, direct.images)
    found.add_drawn(output.images, output.documents, request.batch_size)
    vokens = "".join(f"#{i}" for i in range(32))
    for parent, change in (
        (1, Change((("set", f"voken={vokens}"),))),
        (1, Change((("set", "caption=night: a blue shape"), ("resample", "text")), seed=2)),
        (2, Change((), noise=9)),
    ):
        document = found.pictures[parent].document
        ticket = pool.submit(studio.edit_job(document, change), "a")
        assert finished(ticket).state == worker.DONE
        found.add_edited(parent, change, *ticket.result())
    found.add_opened(output.images[0], output.documents[0])
    pool.close()
    return found


def test_a_session_replays_to_the_same_bytes(session, run, tmp_path, capsys):
    folder = session_folder.write_session(session.pictures, tmp_path / "session")
    read = session_folder.read_session(folder)
    assert [p.entry() for p in read] == [p.entry() for p in session.pictures]
    assert [p.made for p in read] == ["drawn"] * 2 + ["edited"] * 3 + ["opened"]
    words = ["edit", "--session", str(folder), "--checkpoint", str(run), "--out"]
    assert cli.main([*words, str(tmp_path / "again")]) == 0
    assert "6 of 6 pictures to the same bytes" in capsys.readouterr().out
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    image, document = read_png(folder / "000004.png")
    assert document.seed == 9 and (image != read_png(folder / "000002.png")[0]).any()

    # A picture of other pixels is found, and named; so is another model.
    session_folder.save_png(folder / "000002.png", image, read[2].document)
    assert cli.main([*words, str(tmp_path / "third")]) == 1
    assert "000002.png differs from" in capsys.readouterr().err
    with pytest.raises(UserError, match="was made by checkpoint"):
        session_folder.replay(pipeline(COMBINED), folder, tmp_path / "fourth")
    assert cli.main([*words, str(tmp_path / "out"), "--word", "a=b"]) == 2
    assert "has its own edits" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["drawn", "drawn anew"])
def test_a_job_ends_between_two_batches_of_latents(pipe, session, what):
    told = []

    def tell(report):
        told.append(report.words)
        if len(told) == 2:
            raise worker.Stopped

    if what == "drawn":
        job = studio.draw_job(Request(PROMPT, 8, 5, pipe.defaults))
    else:
        change = Change((("resample", f"{COMBINED[0]},{COMBINED[-1]}"),))
        job = studio.edit_job(session.pictures[0].document, change)
    with pytest.raises(worker.Stopped):
        job(studio.Engine(pipe), tell)
    assert told == [studio.WRITING.words] * 2


def test_the_archive_holds_the_folder(session, tmp_path):
    pytest.importorskip("gradio", reason="needs the extra 'ui'")
    from kaleido_jax.ui.handlers import archive

    with zipfile.ZipFile(BytesIO(archive(session.pictures))) as packed:
        packed.extractall(tmp_path)
    read = session_folder.read_session(tmp_path / "kaleido-session")
    assert [p.entry() for p in read] == [p.entry() for p in session.pictures]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data.update(version=2), "version 1"),
        (lambda data: data.update(pictures=[]), "1 to 1000"),
        (lambda data: data["pictures"][2].update(parent=2), "parent is 2"),
        (lambda data: data["pictures"][2].update(seed=-1), "seed is -1"),
        (lambda data: data["pictures"][2].update(step=[["set"]]), "not as it must be"),
        (lambda data: data["pictures"][2].update(step=[["set", 1]]), "not as it must be"),
        (lambda data: data["pictures"][2].update(more=1), "not as it must be"),
        (lambda data: data["pictures"][0].update(together=[0]), "'together' names others"),
        (lambda data: data["pictures"][0].update(together=[0, 77]), "'together' names others"),
        (lambda data: data["pictures"][0].update(together="01"), "together is '0'"),
        (lambda data: data["pictures"][0].update(made="bought"), "not as it must be"),
        (lambda data: data["pictures"].append({"made": "opened"}), "000006.png"),
    ],
)
def test_sessions_that_are_not_right_are_refused(session, tmp_path, change, words):
    folder = session_folder.write_session(session.pictures, tmp_path / "session")
    path = folder / session_folder.FILE
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match=words):
        session_folder.read_session(folder)


# ---- what is shown ---------------------------------------------------------------------------


def test_a_picture_is_encoded_once_and_shown_small_in_the_history(monkeypatch):
    encoded = []
    monkeypatch.setattr(
        session_folder, "png_bytes", lambda *args: encoded.append(args) or png_bytes(*args)
    )
    image = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    session = Session("a")
    made = session.add_drawn(np.stack([image] * 4), [DOCUMENT] * 4, 4)
    session.add_edited(0, Change((("set", "caption=a cat"),)), image, DOCUMENT)
    found = []
    for _ in range(3):
        show.cards(made)
        show.slider(made[0], session.now())
        found.append(show.strip(session.copy()))
    assert len(encoded) == 5 and len(set(found)) == 1
    assert found[0].count("download=") == 1 and found[0].count("<img") == 5
    assert len(found[0]) < len(show.download(session.now())) + 5 * 30_000
    session.clear()
    assert not session.thumbnails


def test_words_of_people_are_escaped():
    caption = "<script>alert(1)</script>"
    document = dataclasses.replace(DOCUMENT, caption=caption)
    picture = Picture(0, IMAGE, document, together=(0,))
    edited = Picture(1, IMAGE, document, 0, Change((("set", f"caption={caption}"),)))
    session = Session("a")
    session.pictures = [picture, edited]
    found = [
        show.cards([picture]),
        show.strip(session),
        show.slider(picture, edited),
        show.marked("caption", "a", caption),
        show.marked("text", "a", caption),
        show.compared([studio.Compared("x<script>", 1.0, IMAGE[None])], caption),
        show.problem(caption),
        show.marked("bbox", "a", "<script> (1, 2, 1, 4)"),
    ]
    for html in found:
        assert "<script" not in html
    assert all("&lt;script" in html for html in (found[0], found[1], *found[3:]))
    assert "<b>." not in found[0]


def test_marks_show_what_changed_and_where_it_is_wrong():
    assert show.marked("text", "A red dog.", "A red dog.") == ""
    assert "<del>red</del><ins>blue</ins>" in show.marked("text", "A red dog.", "A blue dog.")
    # What is too much to compare is one change, unless it begins and ends alike.
    assert show.marked("caption", "a . " * 100, "b . " * 100).count("<ins>") == 1
    many = "A dog . " * 500
    found = show.marked("caption", f"{many}red {many}".strip(), f"{many}blue {many}".strip())
    assert "<del>red</del><ins>blue</ins>" in found
    wrong = show.marked("bbox", "", "a dog (1, 2, 1, 4)")
    assert "<mark>(</mark>" in wrong and "at character 6" in wrong


def test_the_status_tells_place_and_time_left():
    waiting = worker.View(worker.WAITING, 3, None, 13)
    assert "place 3: 2 before you, about 13 s" in show.status(waiting)
    running = worker.View(worker.RUNNING, 0, worker.Report("drawing", 5, 20), None)
    assert "step 5 of 20" in show.status(running) and 'value="25"' in show.status(running)
