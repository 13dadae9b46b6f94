"""The page in headless Chromium: draw, drag a box, draw again, undo, save, open; the editor by
keyboard; how it looks.

KALEIDO_SCREENSHOTS=docs writes the screenshots of the documents anew.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

pytest.importorskip("gradio", reason="needs the extra 'ui'")
pytest.importorskip("selenium", reason="needs selenium (extra 'test')")

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from kaleido_jax.latents import LatentDocument, bbox, load_document, png_bytes, read_png
from kaleido_jax.ui.studio import Engine, Studio
from tests.browser import WAIT, Visitor, picture_of
from tests.test_constrained import pipeline
from tests.test_ui_server import Running

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER),
        reason="needs chromium and chromedriver (Debian's chromium-driver)",
    ),
]
# Of eight pictures of this caption the one whose box is dragged across.
CAPTION, PICTURE = "night: a green shape", 6
ROLES = {"button", "textbox", "spinbutton", "slider", "checkbox", "combobox", "tab", "link"}


def by_hand():
    """The environment of commands started by hand: one device, optimised programs, their cache."""
    ours = ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    cache = pathlib.Path(__file__).resolve().parent.parent / ".pytest_cache" / "kaleido"
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    return {"KALEIDO_CACHE": str(cache), **kept}


@contextlib.contextmanager
def served(folder):
    """The address of `kaleido serve` as it is started by hand."""
    log = folder / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "kaleido_jax.cli", "serve", "--port", "0"],
            stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=by_hand(),
        )  # fmt: skip
    until = time.monotonic() + WAIT
    while not (found := re.search(r"http://[\d.:]+/", log.read_text())):
        assert process.poll() is None and time.monotonic() < until, log.read_text()
        time.sleep(0.05)
    try:
        yield found[0]
    finally:
        process.terminate()
    assert process.wait(30) in (0, -15), log.read_text()
    assert "Traceback" not in log.read_text()


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def driver(downloads):
    options = webdriver.ChromeOptions()
    for word in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        "--hide-scrollbars",
    ):  # fmt: skip
        options.add_argument(word)
    options.binary_location = CHROMIUM
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield found
    found.quit()


@pytest.fixture(scope="module")
def visitor(driver, tmp_path_factory):
    with served(tmp_path_factory.mktemp("serve")) as address:
        found = Visitor(driver, address)
        yield found
        found.leave()


def centre(image, hue):
    """Where the object of a hue lies, in thousandths."""
    from kaleido_jax.data import shapes_detector

    found = shapes_detector.read(image).by_hue(hue)
    assert found is not None
    return found.ellipse[:2]


def test_how_soon_the_first_picture_is_there(driver, tmp_path, capsys):
    with served(tmp_path) as address:
        printed = time.monotonic()
        visitor = Visitor(driver, address)
        visitor.open()
        visitor.until(visitor.wait("#k-draw")[0].is_enabled, "Draw can be pressed")
        visitor.click("#k-draw")
        pressed = time.monotonic()
        visitor.wait("#k-status .k-note")
        answered = time.monotonic()
        (card, *_) = visitor.wait("#k-cards [data-pick]")
        there = time.monotonic()
        assert card.text == "Edit" and picture_of(visitor.wait("#k-cards img")[0]).std() > 0
        visitor.leave()
    with capsys.disabled():
        print(
            f"\nfrom the address to an answered click: {answered - printed:.1f} s"
            f"\nfrom Draw to the first pictures: {there - pressed:.1f} s"
        )


def test_a_box_is_dragged_and_the_object_follows(visitor, downloads):
    from kaleido_jax.data.shapes import HUE_NAMES

    hue = HUE_NAMES.index("green")
    visitor.open(1280, 1290)
    visitor.type("#k-caption textarea", CAPTION)
    visitor.type("#k-number input[type=number]", "8")
    visitor.click("#k-draw")
    buttons = visitor.wait("#k-cards [data-pick]", 8)
    visitor.driver.execute_script(
        "arguments[0].scrollIntoView({block: 'center'})", buttons[PICTURE]
    )
    buttons[PICTURE].click()

    # Drag the box to the other side; the string follows, and says what was changed.
    before = visitor.until(lambda: visitor.boxes() or None, "boxes")
    box = bbox.parse(before)[0].boxes[0]
    middle = (box.x1 + box.x2) / 2
    visitor.drag(750 - middle if middle < 500 else 250 - middle, 0)
    visitor.until(lambda: visitor.boxes() != before, "the string follows")
    dragged = bbox.parse(visitor.boxes())[0].boxes[0]
    assert (
        abs(dragged.x1 - box.x1) > 200 and abs((dragged.x2 - dragged.x1) - (box.x2 - box.x1)) <= 1
    )
    visitor.wait("#k-marks ins")
    visitor.shot("page-1280")

    visitor.click("#k-again")
    visitor.wait("#k-slider .k-over")
    old, new = (
        picture_of(e) for e in visitor.driver.find_elements(By.CSS_SELECTOR, "#k-slider img")
    )
    moved = centre(new, hue)[0] - centre(old, hue)[0]
    wanted = dragged.x1 - box.x1
    assert moved * wanted > 0 and abs(moved) > 150, f"dragged by {wanted}, moved by {moved:.0f}"

    # Save it, undo, and go on from the file.
    visitor.tab("History")
    (current,) = visitor.wait("#k-strip li[aria-current]")
    current.find_element(By.CSS_SELECTOR, "a[download]").click()
    path = downloads / "kaleido-008.png"
    visitor.until(path.exists, "the file")
    image, document = read_png(path)
    np.testing.assert_array_equal(image, new)
    assert bbox.parse(document.latents["bbox"])[0].boxes[0] == dragged
    visitor.tab("Edit")
    visitor.click("#k-undo")
    visitor.until(lambda: visitor.boxes() == before, "undone")

    visitor.go_on_from(path)
    assert "Opened as picture 9" in visitor.driver.page_source
    visitor.tab("History")
    visitor.click("#k-pack button, button#k-pack")
    archive = downloads / "kaleido-session.zip"
    visitor.until(archive.exists, "the session")

    # The archive is a session that is made again to the same bytes.
    shutil.unpack_archive(archive, downloads)
    run = pathlib.Path(__file__).resolve().parent.parent / "kaleido_jax/assets/shapes_kaleido"
    again = subprocess.run(
        [
            sys.executable, "-m", "kaleido_jax.cli", "edit", "--checkpoint", str(run),
            "--session", str(downloads / "kaleido-session"), "--out", str(downloads / "again"),
        ],
        capture_output=True, text=True, check=False, env=by_hand(),
    )  # fmt: skip
    assert again.returncode == 0 and "10 of 10 pictures" in again.stdout, again.stderr
    assert load_document(downloads / "again" / "000008.png") == document


def test_the_keyboard_is_enough(visitor):
    visitor.open()
    visitor.click("#k-draw")
    visitor.wait("#k-cards [data-pick]")[0].send_keys(Keys.ENTER)
    before = visitor.until(lambda: visitor.boxes() or None, "boxes")
    visitor.tab_to("box")
    visitor.press(Keys.ARROW_UP, Keys.ARROW_UP, Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    old = bbox.parse(before)[0].boxes[0]

    def has_moved():
        new = bbox.parse(visitor.boxes())[0].boxes[0]
        return (max(old.x1 - 20, 0), max(old.y1 - 20, 0)) == (new.x1, new.y1)

    visitor.until(has_moved, "moved by arrows")

    # Rename it, add one, take it away again.
    (name, *_) = visitor.wait("#k-editor tbody input[type=text]")
    name.send_keys(Keys.CONTROL, "a")
    name.send_keys("a pale red disc", Keys.TAB)
    visitor.until(lambda: visitor.boxes().startswith("a pale red disc ("), "renamed")
    count = len(visitor.wait("#k-editor g.k-shape"))
    visitor.wait("#k-editor [data-add=bbox]")[0].send_keys(Keys.ENTER)
    visitor.until(lambda: "a new object (350, 350, 650, 650)" in visitor.boxes(), "added")
    visitor.tab_to("box a new object")
    visitor.press(Keys.DELETE)
    visitor.until(lambda: "a new object" not in visitor.boxes(), "deleted")
    assert len(visitor.wait("#k-editor g.k-shape")) == count

    # A mistake is shown where it is; the shapes stay.
    (text, *_) = visitor.wait("#k-bbox textarea")
    text.send_keys(Keys.CONTROL, "a")
    text.send_keys("a dog (1, 2, 1, 4)")
    (mistake,) = visitor.wait("#k-marks .k-error mark")
    assert mistake.text == "("
    visitor.click("#k-again")
    visitor.until(lambda: "must be less than" in visitor.driver.page_source, "refused")


# ---- the editor, on pictures that are opened ---------------------------------------------------


@pytest.fixture(scope="module")
def opened(driver, tmp_path_factory):
    """A page on a tiny model that nobody asks to draw, and files to open there."""
    names = ("bbox", "blob", "voken")
    studio = Studio([Engine(pipeline(names))], warm=False)
    folder = tmp_path_factory.mktemp("opened")
    image = np.full((studio.size,) * 2 + (3,), 90, np.uint8)
    strings = {
        "bbox": "a red disc (50, 50, 250, 250) (700, 50, 900, 250) a bar (300, 700, 600, 900)",
        "blob": "a red disc (150, 450, 120, 60, 30)",
        "voken": "".join(f"#{i}" for i in range(32)),
    }
    found = []
    for i, box in enumerate((strings["bbox"], "a cat (400, 100, 600, 400) a dog (1, 2, 300, 400)")):
        document = LatentDocument("two things", {**strings, "bbox": box}, steps=3)
        found.append(folder / f"{i}.png")
        found[-1].write_bytes(png_bytes(image, document))
    with Running(studio, folder / "uploads") as running:
        visitor = Visitor(driver, running.address)
        yield visitor, found
        visitor.leave()
    studio.pool.close()


def test_tab_visits_every_shape_and_leaves(opened):
    visitor, (path, _) = opened
    visitor.open()
    visitor.go_on_from(path)
    shapes = visitor.shapes()
    assert len(shapes) == 4 and shapes[3].startswith("ellipse")
    visitor.tab_to(shapes[0])
    for shape in (*shapes[1:], "name of box 1"):
        visitor.press(Keys.TAB)
        assert visitor.focused() == shape
    for shape in reversed(shapes):
        visitor.press(Keys.TAB, held=Keys.SHIFT)
        assert visitor.focused() == shape
    visitor.press(Keys.TAB, held=Keys.SHIFT)
    assert visitor.focused() == "Add an ellipse"


def test_the_keyboard_stays_where_it_was(opened):
    visitor, (path, _) = opened
    visitor.open()
    visitor.go_on_from(path)
    # At the next shape, where one was deleted; in the table at its button.
    shapes = visitor.shapes()
    visitor.tab_to(shapes[0])
    visitor.press(Keys.DELETE)
    visitor.until(lambda: len(visitor.shapes()) == 3, "deleted")
    assert visitor.focused() == shapes[1]
    visitor.tab_to("delete box 2")
    visitor.press(Keys.ENTER)
    visitor.until(lambda: len(visitor.shapes()) == 2, "deleted")
    assert visitor.focused() == "delete ellipse 1"
    visitor.until(lambda: visitor.boxes() == "a red disc (700, 50, 900, 250)", "the string follows")
    # In a number field, at each press of an arrow.
    visitor.click("#k-editor tbody input[type=number]")
    for number in (701, 702, 703):
        visitor.press(Keys.ARROW_UP)
        box = f"a red disc ({number}, 50, 900, 250)"
        visitor.until(lambda box=box: visitor.boxes() == box, "the string follows")
        assert visitor.focused() == "x1 of box 1"
    # What may not be is put right in the field itself.
    visitor.press("a", held=Keys.CONTROL)
    visitor.press("5000", Keys.ENTER)
    visitor.until(lambda: "(900, 50, 1000, 250)" in visitor.boxes(), "corrected")
    assert visitor.driver.switch_to.active_element.get_attribute("value") == "900"


def test_another_picture_may_come_during_a_drag(opened):
    visitor, (first, second) = opened
    visitor.open()
    visitor.go_on_from(first)
    visitor.go_on_from(second)
    (shape, *_) = visitor.wait("#k-editor g.k-shape")
    hand = ActionChains(visitor.driver)
    hand.move_to_element(shape).click_and_hold().move_by_offset(20, 20).perform()
    # As when a picture that was being drawn is there.
    visitor.driver.execute_script("document.querySelector('#k-strip [data-pick]').click()")
    boxes = load_document(first).latents["bbox"]
    visitor.until(lambda: visitor.boxes() == boxes, "the other picture")
    hand = ActionChains(visitor.driver)
    hand.move_by_offset(20, 20).release().perform()
    assert visitor.shapes()[0] == "box a red disc: x1 50, y1 50, x2 250, y2 250"
    visitor.tab_to("box a red disc")
    visitor.press(Keys.ARROW_DOWN)
    moved = boxes.replace("(50, 50, 250, 250)", "(50, 60, 250, 260)")
    visitor.until(lambda: visitor.boxes() == moved, "only what was done to this one")


def test_the_grid_of_vokens_follows(opened):
    visitor, (path, _) = opened
    visitor.open()
    visitor.go_on_from(path)

    def grid():
        return picture_of(visitor.wait("#k-vokens img")[0])

    before = grid()
    (box, *_) = visitor.wait("#k-voken textarea")
    box.send_keys(Keys.CONTROL, Keys.HOME, Keys.NULL, Keys.ARROW_RIGHT, Keys.DELETE, "63")

    visitor.until(lambda: (grid() != before).any(), "another colour")
    changed = (grid() != before).any(-1)
    tall, wide = np.array(changed.shape) // (4, 8)
    assert changed[:tall, :wide].any() and not changed[tall:].any() and not changed[:, wide:].any()


# ---- the whole page ----------------------------------------------------------------------------


def test_everything_has_a_name_and_fits(visitor):
    for width, dark in ((1280, False), (390, False), (390, True)):
        visitor.open(width, 1500 if width < 600 else 1000, dark)
        visitor.type("#k-number input[type=number]", "1")
        visitor.click("#k-draw")
        visitor.wait("#k-cards [data-pick]")[0].click()
        visitor.wait("#k-editor g.k-shape")
        wide = visitor.driver.execute_script("return document.documentElement.scrollWidth")
        assert wide <= width
        tree = visitor.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
        nameless = [
            node["role"]["value"]
            for node in tree
            if not node.get("ignored")
            and node["role"]["value"] in ROLES
            and not node.get("name", {}).get("value", "").strip()
        ]
        assert not nameless
        pale = visitor.shot(f"page-{width}" + ("-dark" if dark else "")) if width < 600 else None
        if pale is not None:
            light = np.asarray(pale).mean() > 128
            assert light != dark


def test_both_models_are_compared(visitor):
    visitor.open()
    visitor.tab("Compare")
    visitor.click("#k-compare")
    visitor.wait("#k-table table")
    rows = visitor.driver.find_elements(By.CSS_SELECTOR, "#k-table tbody tr")
    heads = visitor.driver.find_elements(By.CSS_SELECTOR, "#k-table thead th")
    assert [head.text for head in heads] == [f"guidance {w}" for w in (1, 2, 4, 8)]
    assert [row.find_element(By.TAG_NAME, "th").text for row in rows] == ["baseline", "Kaleido"]
    for row in rows:
        assert len(row.find_elements(By.TAG_NAME, "img")) == 16


def test_nothing_came_from_elsewhere_and_no_script_failed(visitor):
    visitor.open()
    for name in ("Edit", "History", "Compare", "About"):
        visitor.tab(name)
    foreign = []
    for line in visitor.driver.get_log("performance"):
        message = json.loads(line["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            url = message["params"]["request"]["url"]
            if not url.startswith(("http://127.0.0.1:", "data:", "blob:", "chrome")):
                foreign.append(url)
    assert not foreign
    visitor.leave()
