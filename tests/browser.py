"""Headless Chromium, driven over a pipe by its DevTools protocol; nothing else is needed for it."""

import base64
import json
import os
import shutil
import subprocess
from contextlib import contextmanager

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed: make browser")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]


class Page:
    """An open page: `complaints` is what its console and policy said, `requests` what it loaded."""

    def __init__(self, to_browser, from_browser):
        self.to_browser, self.from_browser = to_browser, from_browser
        self.sent, self.session, self.loaded = 0, None, False
        self.complaints: list[str] = []
        self.requests: list[str] = []

    def call(self, method: str, **parameters) -> dict:
        """The answer to a command; what happens meanwhile is noted."""
        self.sent += 1
        message = {"id": self.sent, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        self.to_browser.write(json.dumps(message).encode() + b"\0")
        self.to_browser.flush()
        while True:
            reply = self.receive()
            if reply.get("id") == self.sent:
                assert "error" not in reply, reply
                return reply["result"]

    def receive(self) -> dict:
        """The next message; an event is noted."""
        text = bytearray()
        while (byte := self.from_browser.read(1)) not in (b"\0", b""):
            text += byte
        assert text, "Chromium has ended"
        message = json.loads(text)
        method, parameters = message.get("method"), message.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        elif method == "Page.loadEventFired":
            self.loaded = True
        elif method == "Runtime.consoleAPICalled":
            self.complaints.append(str(parameters["args"]))
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(str(parameters["exceptionDetails"]))
        elif method == "Log.entryAdded":
            self.complaints.append(parameters["entry"]["text"])
        elif method == "Page.javascriptDialogOpening":
            self.complaints.append("dialog: " + parameters["message"])
        return message

    def open(self, address: str) -> None:
        """Load `address`, and wait until it is."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.loaded = False
        self.call("Page.navigate", url=address)
        while not self.loaded:
            self.receive()

    def run(self, script: str):
        """The value of an expression in the page, awaited if it is a promise."""
        done = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def screenshot(self, path, width: int, height: int, dark: bool = False) -> None:
        """Write what it looks like in a window of that size to `path`."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))


@contextmanager
def opened(path, profile):
    """The HTML file at `path`, or what an address gives, in a browser of its own.

    The browser's files lie in the folder `profile`.
    """
    in_read, in_write = os.pipe()
    out_read, out_write = os.pipe()
    command = f'exec "$@" 3<&{in_read} 4>&{out_write}'
    browser = subprocess.Popen(
        ["bash", "-c", command, "chromium", CHROMIUM, *FLAGS]
        + ["--remote-debugging-pipe", f"--user-data-dir={profile}"],
        pass_fds=(in_read, out_write),
        stderr=subprocess.DEVNULL,
    )
    os.close(in_read), os.close(out_write)
    try:
        with os.fdopen(in_write, "wb") as to_browser, os.fdopen(out_read, "rb") as from_browser:
            page = Page(to_browser, from_browser)
            page.open(path if isinstance(path, str) else path.as_uri())
            yield page
    finally:
        browser.kill()
        browser.wait()
