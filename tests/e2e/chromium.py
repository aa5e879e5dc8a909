"""A headless Chromium, told what to do by its DevTools protocol over two pipes. No library: a message is JSON and a NUL."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
PATIENCE_SECONDS = 60.0


class Tab:
    """One page. `complaints` is what it wrote to its console as warning or error, and exceptions nobody caught."""

    def __init__(self, writes: int, reads: int) -> None:
        self._writes, self._reads = writes, reads
        self._num_calls = 0
        self._unread = b""
        self._session: str | None = None
        self.complaints: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a method of the protocol."""
        self._num_calls += 1
        message = {"id": self._num_calls, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._writes, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next_message()
            if answer.get("id") == self._num_calls:
                assert "error" not in answer, answer
                return dict(answer["result"])
            self._note(answer)

    def open(self, url: str, *, width: int, height: int, dark: bool = False) -> None:
        """Go there, with a window of so many CSS pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 500,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete'")

    def value(self, expression: str) -> Any:
        """What a JavaScript expression comes to."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait_for(self, expression: str) -> None:
        """Until it comes to something true."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not self.value(expression):
            assert time.monotonic() < deadline, self.value("document.body.innerText")
            time.sleep(0.1)

    def screenshot(self) -> bytes:
        """All of the page, as PNG."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        return base64.b64decode(shot["data"])

    def _next_message(self) -> dict[str, Any]:
        while b"\0" not in self._unread:
            read = os.read(self._reads, 1 << 20)
            assert read, "chromium is gone"
            self._unread += read
        message, _, self._unread = self._unread.partition(b"\0")
        return dict(json.loads(message))

    def _note(self, event: dict[str, Any]) -> None:
        params = event.get("params", {})
        match event.get("method"):
            case "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(params["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning"):
                self.complaints.append(json.dumps(params["args"]))
            case "Log.entryAdded" if params["entry"]["level"] in ("error", "warning"):
                self.complaints.append(json.dumps(params["entry"]))


@contextmanager
def open_tab(user_data: Path) -> Iterator[Tab]:
    """A tab of a new browser, whose files go into `user_data`."""
    assert CHROMIUM is not None
    to_read, we_write = pipe()
    we_read, to_write = pipe()
    # It reads from descriptor 3 and writes to 4.
    command = ["bash", "-c", f'exec "$@" 3<&{to_read} 4>&{to_write}', "bash", CHROMIUM]
    process = subprocess.Popen(
        [*command, *FLAGS, f"--user-data-dir={user_data}"],
        pass_fds=(to_read, to_write),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(to_read)
    os.close(to_write)
    try:
        yield Tab(we_write, we_read)
    finally:
        process.terminate()
        process.wait(30)
        os.close(we_write)
        os.close(we_read)


def pipe() -> tuple[int, int]:
    """Away from the descriptors that the shell is to set."""
    low = os.pipe()
    high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in low]
    for end in low:
        os.close(end)
    return high[0], high[1]
