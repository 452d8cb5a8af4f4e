"""A headless Chromium for tests of pages, driven over its debugging pipe."""

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

PHONE, LAPTOP = (390, 844), (1366, 768)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
)


class Browser:
    """Headless Chromium over its debugging pipe (file descriptors 3 and 4, JSON ending in \\0)."""

    def __init__(self, profile: str) -> None:
        name = shutil.which("chromium") or shutil.which("google-chrome")
        assert name, "chromium is missing; please `apt-get install chromium`"
        ours_in, theirs_out = _pipe()
        theirs_in, ours_out = _pipe()
        launcher = ["bash", "-c", f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}', "bash"]
        self.process = subprocess.Popen(
            [*launcher, name, *FLAGS, f"--user-data-dir={profile}"],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._in, self._out = ours_in, ours_out
        self._buffer, self._count, self._session = b"", 0, None
        self.complaints: list[str] = []
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command and its answer; events in between are kept."""
        self._count += 1
        number = self._count
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (event := self._next()).get("id") != number:
            self._note(event)
        assert "error" not in event, (method, event["error"])
        return event["result"]

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression; promises are awaited."""
        answer = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def open(self, url: str, size: tuple[int, int], scheme: str = "light") -> None:
        """Opens a page at a viewport size and a system colour scheme, and waits for its load."""
        self.complaints.clear()
        self.requests.clear()
        phone = size[0] < 600
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 2 if phone else 1}
        self.call("Emulation.setDeviceMetricsOverride", mobile=phone, **metrics)
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.call("Emulation.setEmulatedMedia", features=[feature])
        self.call("Page.navigate", url=url)
        ready = "location.href !== 'about:blank' && document.readyState === 'complete'"
        deadline = time.monotonic() + 60
        while not self.run(ready):
            assert time.monotonic() < deadline, "the page did not finish loading in a minute"
            time.sleep(0.05)

    def screenshot(self, path: Path) -> None:
        """The whole page as PNG."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.call("Browser.close")
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self._in)
        os.close(self._out)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], 60)
            assert ready, "chromium did not answer within a minute"
            data = os.read(self._in, 1 << 20)
            if not data:
                raise OSError("chromium has gone")
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        method = event.get("method", "")
        if method in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            self.complaints.append(json.dumps(event["params"])[:500])
        elif method == "Network.requestWillBeSent":
            url = event["params"]["request"]["url"]
            if not url.startswith("data:"):
                self.requests.append(url)


def _pipe() -> tuple[int, int]:
    """A pipe whose descriptors lie out of the way of 3 and 4."""
    ends = os.pipe()
    high = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 20) for end in ends)
    for end in ends:
        os.close(end)
    return high


OVERFLOW = """(() => {
  const width = document.documentElement.clientWidth;
  const inside = (e) => e.closest(".scroll, .matrix, dialog, svg");
  const wide = [...document.body.querySelectorAll("*")].filter((e) =>
    !inside(e) && e.getBoundingClientRect().right > width + 0.5);
  return [document.documentElement.scrollWidth - width, wide.map((e) => e.outerHTML.slice(0, 80))];
})()"""

BROKEN_IMAGES = """(async () => {
  const images = [...document.images].filter((i) => i.src);
  await Promise.allSettled(images.map((i) => i.decode()));
  return images.filter((i) => !i.naturalWidth).length;
})()"""
