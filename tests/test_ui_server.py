"""The page's web server: bounds over HTTP, tokens, places in the queue, who goes away."""

from __future__ import annotations

import base64
import os
import resource
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import pytest

pytest.importorskip("gradio", reason="needs the extra 'ui'")

import gradio_client
import httpx
import uvicorn
from PIL import Image

from kaleido_jax import cli
from kaleido_jax.errors import UserError
from kaleido_jax.latents import LatentDocument, png_bytes
from kaleido_jax.ui import bounds, server, sessions
from kaleido_jax.ui.studio import Engine, Studio
from tests.test_constrained import COMBINED, PROMPT, pipeline

USERS = 20
TOKEN = "a long enough secret"


@pytest.fixture(scope="module")
def studio():
    made = Studio([Engine(pipeline(COMBINED))], warm=False)
    yield made
    made.pool.close()


class Running:
    """The web application on a port of its own, in a thread."""

    def __init__(self, studio, uploads, token=None):
        self.uploads, self.app = uploads, server.build(studio, str(uploads), token)
        self._door = server.listen("127.0.0.1", 0)
        self.address = f"http://127.0.0.1:{self._door.getsockname()[1]}/"
        self._server = uvicorn.Server(
            uvicorn.Config(self.app, log_level="error", timeout_graceful_shutdown=1)
        )
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._door]}, daemon=True
        )

    def __enter__(self):
        self._thread.start()
        while not self._server.started:
            time.sleep(0.05)
        return self

    def __exit__(self, *_):
        self._server.should_exit = True
        self._thread.join(30)
        self._door.close()


@pytest.fixture(scope="module")
def running(studio, tmp_path_factory):
    with Running(studio, tmp_path_factory.mktemp("uploads")) as found:
        yield found


def test_the_page_is_served_and_loads_nothing_from_elsewhere(running):
    found = httpx.get(running.address)
    assert (
        found.status_code == 200
        and "default-src 'self'" in found.headers["content-security-policy"]
    )
    config = httpx.get(f"{running.address}config").json()
    assert config["analytics_enabled"] is False and config["run_history"] is False
    assert "fonts.googleapis" not in found.text


def test_bodies_and_uploads_are_bounded(running):
    too_much = b"x" * (server.MAX_BODY_BYTES + 1)
    address = f"{running.address}gradio_api/queue/join"
    assert httpx.post(address, content=too_much).status_code == 413

    def pieces():
        for _ in range(server.MAX_BODY_BYTES // 2**20 + 1):
            yield b"x" * 2**20

    # Cut off in the middle; who reads it then says that it is broken.
    assert httpx.post(address, content=pieces()).status_code in (400, 413)
    upload = {"files": ("a.png", b"x" * (bounds.MAX_UPLOAD_BYTES + 1))}
    assert httpx.post(f"{running.address}gradio_api/upload", files=upload).status_code == 413
    (running.uploads / "held").touch()
    os.truncate(running.uploads / "held", server.MAX_UPLOADS_BYTES)  # a hole, no bytes
    upload = {"files": ("a.png", b"x")}
    assert httpx.post(f"{running.address}gradio_api/upload", files=upload).status_code == 507
    (running.uploads / "held").unlink()
    assert httpx.post(f"{running.address}gradio_api/upload", files=upload).status_code == 200
    for path in ("/etc/passwd", "../../../../etc/passwd", "%2e%2e/%2e%2e/etc/passwd"):
        found = httpx.get(f"{running.address}gradio_api/file={path}")
        assert found.status_code in (403, 404) and "root:" not in found.text


def test_who_waits_leaves_room_for_the_others(tmp_path):
    people = 41  # one more than gradio does at once by itself
    begun, go = threading.Event(), threading.Event()
    studio = Studio([Engine(pipeline(COMBINED))], warm=False, waiting=people)
    studio.pool.submit(lambda engine, tell: (begun.set(), go.wait(240)), "first")
    assert begun.wait(60)
    with Running(studio, tmp_path) as found:
        mounted = [getattr(route, "app", None) for route in found.app._app.routes]
        (holder,) = [app.state_holder for app in mounted if hasattr(app, "state_holder")]
        assert holder.capacity == sessions.MAX_SESSIONS
        call = f"{found.address}gradio_api/call/create"

        def ask(user):
            body = {"data": [PROMPT, 1, None, 2, None, None, 0], "session_hash": f"user {user}"}
            return httpx.post(call, json=body).json()["event_id"]

        for user in range(people):
            ask(user)
        until = time.monotonic() + 60
        while studio.pool.waiting() < people:
            assert time.monotonic() < until, f"{studio.pool.waiting()} of {people} wait"
            time.sleep(0.05)
        # One more is told so at once.
        with httpx.stream("GET", f"{call}/{ask('more')}", timeout=60) as stream:
            assert "people are waiting already" in "".join(stream.iter_text())
        go.set()
        studio.pool.close()


def test_what_nobody_reads_is_not_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr("kaleido_jax.ui.studio.LEASE_SECONDS", 1.0)
    begun, go = threading.Event(), threading.Event()
    studio = Studio([Engine(pipeline(COMBINED))], warm=False)
    studio.pool.submit(lambda engine, tell: (begun.set(), go.wait(240)), "first")
    assert begun.wait(60)
    with Running(studio, tmp_path) as found:
        client = gradio_client.Client(found.address, verbose=False)
        reader = client.submit(caption=PROMPT, steps=2, api_name="/create")
        body = {"data": [PROMPT, 1, None, 2, None, None, 0], "session_hash": "nobody"}
        httpx.post(f"{found.address}gradio_api/call/create", json=body)
        for waiting in (2, 1):  # the one whose answers are read stays
            until = time.monotonic() + 60
            while studio.pool.waiting() != waiting:
                assert time.monotonic() < until, f"{studio.pool.waiting()} wait"
                time.sleep(0.02)
        time.sleep(1.5)
        assert studio.pool.waiting() == 1 and not reader.done()
        reader.cancel()
        client.close()
        go.set()
    studio.pool.close()


def test_programs_create_and_edit(running):
    client = gradio_client.Client(running.address, verbose=False)
    drawn = client.predict(caption=PROMPT, number=2, seed=5, api_name="/create")
    direct = pipeline(COMBINED)(PROMPT, 2, seed=5, batch_size=bounds.BATCH)
    for found, image, document in zip(
        drawn["pictures"], direct.images, direct.documents, strict=True
    ):
        assert base64.b64decode(found["png"]) == png_bytes(image, document)
    document = drawn["pictures"][0]["document"]
    again = client.predict(
        document=document, step=[["set", "caption=dusk: a blue shape"]], api_name="/edit"
    )
    edited = LatentDocument.from_dict(again["pictures"][0]["document"])
    assert edited.caption == "dusk: a blue shape" and edited.seed == 5
    assert Image.open(BytesIO(base64.b64decode(again["pictures"][0]["png"]))).size == (8, 8)
    for values, words in (
        ({"caption": PROMPT, "steps": 10**9}, "between 1 and 250"),
        ({"caption": PROMPT, "number": -1}, "between 1 and 8"),
        ({"caption": "\x00"}, "control character"),
    ):
        with pytest.raises(Exception, match=words):
            client.predict(**values, api_name="/create")
    with pytest.raises(Exception, match="unknown edit 'exec'"):
        client.predict(document=document, step=[["exec", "1"]], api_name="/edit")
    client.close()


def test_off_loopback_a_token_is_needed(studio, tmp_path):
    assert server.choose_token("127.0.0.1", None) is None
    assert len(server.choose_token("0.0.0.0", None)) >= 24
    assert server.choose_token("0.0.0.0", TOKEN) == TOKEN
    with pytest.raises(UserError, match="12 characters"):
        server.choose_token("127.0.0.1", "short")
    with Running(studio, tmp_path, TOKEN) as found:
        assert "window.gradio_config" in httpx.get(found.address).text  # the way in
        for path in ("config", "gradio_api/info", "gradio_api/file=x"):
            assert httpx.get(found.address + path).status_code == 401
        wrong = {"username": "a", "password": "wrong"}
        assert httpx.post(f"{found.address}login", data=wrong).status_code == 400
        client = gradio_client.Client(found.address, auth=("anybody", TOKEN), verbose=False)
        assert client.predict(caption=PROMPT, api_name="/create")["state"] == "done"
        client.close()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--port", "99999"], "0 to 65535"),
        (["--checkpoint", "no_such_folder"], "there is no folder no_such_folder"),
        (["--host", "203.0.113.1", "--port", "0"], "--host 203.0.113.1 --port 0"),
    ],
)
def test_misuse_of_the_verb_is_one_line(capsys, monkeypatch, words, message):
    monkeypatch.setattr("kaleido_jax.ui.studio.open_engines", lambda *_: [])
    assert cli.main(["serve", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


class Held:
    """A pipeline that waits at each preview until it is let go, and counts them."""

    def __init__(self, pipe):
        self._pipe, self.steps = pipe, []
        self.reached, self.go = threading.Event(), threading.Event()

    def __getattr__(self, name):
        return getattr(self._pipe, name)

    def render(self, documents, *, on_step, **options):
        def step(progress):
            self.steps.append(progress.step)
            self.reached.set()
            assert self.go.wait(60)
            on_step(progress)

        return self._pipe.render(documents, on_step=step, **options)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["cancel", "disconnect"])
def test_who_goes_away_frees_the_device_within_two_steps(tmp_path, how):
    held = Held(pipeline(COMBINED))
    studio = Studio([Engine(held)], warm=False)
    with Running(studio, tmp_path) as found:
        if how == "cancel":
            client = gradio_client.Client(found.address, verbose=False)
            job = client.submit(caption=PROMPT, steps=50, api_name="/create")
            assert held.reached.wait(60)
            job.cancel()
        else:
            call = f"{found.address}gradio_api/call/create"
            event = httpx.post(call, json={"data": [PROMPT, 1, None, 50, None, None, 0]}).json()
            with httpx.stream("GET", f"{call}/{event['event_id']}", timeout=60) as stream:
                for line in stream.iter_lines():
                    if line.startswith("data"):
                        break
                assert held.reached.wait(60)
        until = time.monotonic() + 60
        while not all(ticket.unwanted for ticket in set(studio.pool._running)):
            assert time.monotonic() < until, "the server has not noticed"
            time.sleep(0.05)
        held.go.set()
        # The next one is served: the device is free.
        client = gradio_client.Client(found.address, verbose=False)
        assert client.predict(caption=PROMPT, steps=2, api_name="/create")["state"] == "done"
        assert held.steps == [2, 2]
        client.close()
    studio.pool.close()


@pytest.mark.slow
def test_twenty_people_at_once(running, studio):
    pipe = pipeline(COMBINED)
    wanted = {}
    for user in range(USERS):
        made = pipe(f"{PROMPT}, number {user}", 1, seed=user, batch_size=1)
        wanted[user] = png_bytes(made.images[0], made.documents[0])
    clients = [gradio_client.Client(running.address, verbose=False) for _ in range(USERS)]

    def ask(user):
        job = clients[user].submit(
            caption=f"{PROMPT}, number {user}", seed=user, api_name="/create"
        )
        done = job.result(timeout=240)
        assert [base64.b64decode(p["png"]) for p in done["pictures"]] == [wanted[user]]
        return [state["position"] for state in job.outputs() if state["state"] == "waiting"]

    def everybody():
        with ThreadPoolExecutor(USERS) as threads:
            return list(threads.map(ask, range(USERS)))

    # Nobody is served before the last has asked.
    begun, go = threading.Event(), threading.Event()
    studio.pool.submit(lambda engine, tell: (begun.set(), go.wait(240)), "first")
    assert begun.wait(60)
    letting = threading.Thread(target=_let_go_at, args=(studio.pool, USERS, go))
    letting.start()
    places = everybody()
    letting.join()
    # Everybody was told a place, no two the same at first, and moved up.
    assert sorted(seen[0] for seen in places) == list(range(1, USERS + 1))
    assert all(seen == sorted(seen, reverse=True) for seen in places)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(3):
        everybody()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    assert grown < 64 * 1024, f"{grown / 1024:.0f} MiB more"
    assert studio.pool.waiting() == 0 and len(studio.sessions) <= USERS
    for client in clients:
        client.close()


def _let_go_at(pool, count, go):
    until = time.monotonic() + 240
    while pool.waiting() < count and time.monotonic() < until:
        time.sleep(0.05)
    go.set()
