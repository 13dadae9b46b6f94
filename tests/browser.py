"""A person at the page: what tests do in the browser."""

from __future__ import annotations

import base64
import os
import pathlib
from io import BytesIO

import numpy as np
from PIL import Image
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from kaleido_jax.latents import load_document

WAIT = 300
SCREENSHOTS = os.environ.get("KALEIDO_SCREENSHOTS")


def picture_of(element):
    data = element.get_attribute("src").partition("base64,")[2]
    return np.asarray(Image.open(BytesIO(base64.b64decode(data))).convert("RGB"))


class Visitor:
    """A person at the page."""

    def __init__(self, driver, address):
        self.driver, self.address = driver, address

    def open(self, width=1280, height=1000, dark=False):
        self.leave()
        size = dict(width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.get(self.address + ("?__theme=dark" if dark else ""))
        self.wait("#k-draw")

    def leave(self):
        """Goes away; no script may have failed until then. That streams break off is no failure."""
        severe = [line for line in self.driver.get_log("browser") if line["level"] == "SEVERE"]
        assert not severe, severe
        self.driver.get("about:blank")
        self.driver.get_log("browser")

    def wait(self, css, count=1):
        """The elements that can be seen, once there are `count`."""

        def there():
            found = [e for e in self.driver.find_elements(By.CSS_SELECTOR, css) if e.is_displayed()]
            return found if len(found) >= count else None

        return self.until(there, f"{css} x {count}")

    def until(self, condition, words):
        # What is drawn anew while it is looked at is looked at again.
        wait = WebDriverWait(self.driver, WAIT, ignored_exceptions=[StaleElementReferenceException])
        return wait.until(lambda _: condition(), words)

    def click(self, css):
        (button, *_) = self.wait(css)
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
        button.click()

    def tab(self, name):
        """Chooses a tab; at narrow widths it is in the menu of those that have no room."""

        def find():
            found = self.driver.find_elements(By.XPATH, f"//button[contains(., '{name}')]")
            return [e for e in found if e.is_displayed() and e.text.strip() == name]

        if not find():
            self.click(".overflow-menu > button")
        self.until(find, name)[0].click()

    def type(self, css, words):
        (box, *_) = self.wait(css)
        box.send_keys(Keys.CONTROL, "a")
        box.send_keys(words)

    def press(self, *keys, held=None):
        """Keys of a keyboard, at whatever has the focus; `held` is one held down meanwhile."""
        hand = ActionChains(self.driver)
        if held is not None:
            hand.key_down(held).send_keys(*keys).key_up(held).perform()
        else:
            hand.send_keys(*keys).perform()

    def focused(self):
        """The name of what the keyboard is at."""
        return self.driver.execute_script(
            "const at = document.activeElement; return at.ariaLabel || at.textContent.trim()"
        )

    def tab_to(self, start, limit=80):
        """Presses Tab until it is at what has a name that starts so."""
        for _ in range(limit):
            self.press(Keys.TAB)
            if self.focused().startswith(start):
                return
        raise AssertionError(f"{limit} times Tab, and not at {start}")

    def shapes(self):
        """The names of all shapes, in order."""
        return self.driver.execute_script(
            "return [...document.querySelectorAll('#k-editor g.k-shape')].map((g) => g.ariaLabel)"
        )

    def go_on_from(self, path):
        """Opens one of our PNGs and goes to the editor."""
        self.tab("History")
        fields = "#k-upload input[type=file]"
        if not self.driver.find_elements(By.CSS_SELECTOR, fields):
            self.click("#k-upload button[aria-label=Clear]")
        find = lambda: self.driver.find_elements(By.CSS_SELECTOR, fields)  # noqa: E731
        self.until(find, "room for a file")[0].send_keys(str(path))
        document = load_document(path)
        self.tab("Edit")
        self.until(lambda: self.boxes() == document.latents["bbox"], "its boxes")

    def boxes(self):
        return self.wait("#k-bbox textarea")[0].get_attribute("value")

    def drag(self, dx, dy):
        """Drags the first box by thousandths of the picture, in steps as a hand does."""
        (shape, *_) = self.wait("#k-editor g.k-shape")
        width = self.wait("#k-editor svg")[0].size["width"]
        hand = ActionChains(self.driver).move_to_element(shape).click_and_hold()
        for _ in range(4):
            hand.move_by_offset(round(dx * width / 4000), round(dy * width / 4000))
        hand.release().perform()

    def shot(self, name):
        """A screenshot, small enough for the documents."""
        picture = Image.open(BytesIO(self.driver.get_screenshot_as_png())).convert("RGB")
        if SCREENSHOTS and not name.endswith("dark"):
            picture.quantize(96).save(pathlib.Path(SCREENSHOTS) / f"{name}.png", optimize=True)
        return picture
