"""A headless Chromium, driven over the DevTools protocol."""

import base64
import json
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websocket import WebSocket, create_connection

_START_S, _ANSWER_S = 60, 60


def find_browser() -> str | None:
    """The path of a Chromium on this machine."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


class Page:
    """One page. `requests` are the URLs that it has requested, `errors` those that it reported."""

    def __init__(self, socket: WebSocket) -> None:
        self._socket = socket
        self._number = 0
        self.requests: list[str] = []
        self.errors: list[str] = []

    def call(self, method: str, **arguments: Any) -> Mapping[str, Any]:
        """Call a method and return its result; events that arrive before it are recorded."""
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": arguments}))
        while True:
            message = json.loads(self._socket.recv())
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]
            self._note(message)

    def _note(self, message: Mapping[str, Any]) -> None:
        if message["method"] == "Network.requestWillBeSent":
            self.requests.append(message["params"]["request"]["url"])
        elif message["method"] in ("Runtime.exceptionThrown", "Log.entryAdded"):
            self.errors.append(json.dumps(message["params"]))

    def open(self, file: Path, *, width: int, scheme: str) -> None:
        """Show a file in a window `width` pixels wide, in the color scheme light or dark."""
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        self.call(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": scheme}],
        )
        self.call("Page.navigate", url=file.as_uri())
        deadline = time.monotonic() + _ANSWER_S
        while self.value("document.readyState + location.protocol") != "completefile:":
            assert time.monotonic() < deadline, "the page is not complete"
            time.sleep(0.05)

    def value(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """Write the full page as a PNG."""
        found = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))


@contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """A browser with its profile in a folder; it is ended at the end of the block."""
    program = find_browser()
    assert program is not None
    process = subprocess.Popen(
        [
            program,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--remote-debugging-port=0",
            "--no-first-run",
            "--disable-background-networking",
            "--remote-allow-origins=*",
            f"--user-data-dir={folder}",
            "about:blank",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        socket = create_connection(_address(folder, process), timeout=_ANSWER_S)
        try:
            yield Page(socket)
        finally:
            socket.close()
    finally:
        process.terminate()
        process.wait(timeout=30)


def _address(folder: Path, process: "subprocess.Popen[bytes]") -> str:
    """The WebSocket URL of a new page.

    The browser writes its port into its profile once it listens.
    """
    file = folder / "DevToolsActivePort"
    deadline = time.monotonic() + _START_S
    while not (file.exists() and len(file.read_text().splitlines()) == 2):
        assert process.poll() is None, f"the browser ended with {process.returncode}"
        assert time.monotonic() < deadline, "the browser does not listen"
        time.sleep(0.05)
    port, path = file.read_text().splitlines()
    browser_socket = create_connection(f"ws://127.0.0.1:{port}{path}", timeout=_ANSWER_S)
    target = Page(browser_socket).call("Target.createTarget", url="about:blank")
    browser_socket.close()
    return f"ws://127.0.0.1:{port}/devtools/page/{target['targetId']}"
