"""A headless Chromium, driven over pipes: its DevTools protocol as JSON messages that end in NUL, no socket at all."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
from pathlib import Path
from types import TracebackType
from typing import Any

from tenon.base.clock import SYSTEM
from tests.server.conftest import PATIENCE_S

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
OPTIONS = (
    "--headless=new", "--remote-debugging-pipe", "--no-first-run", "--no-default-browser-check", "--disable-gpu",
    "--disable-dev-shm-usage", "--disable-extensions", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--disable-default-apps", "--password-store=basic", "--hide-scrollbars", "--mute-audio",
    "--force-color-profile=srgb", "--lang=en-US",
)  # fmt: skip


def binary() -> str | None:
    """Where a Chromium is, if there is one."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class BrowserError(Exception):
    """The browser refused a command, or a script in a page raised."""


class Browser:
    """One browser process with a profile of its own. A context manager: the process is gone afterwards."""

    def __init__(self, program: str, profile: Path) -> None:
        # The browser reads commands at 3 and writes at 4: the pipes' own numbers must be others.
        theirs_in, self._commands = _above(os.pipe())
        self._replies, theirs_out = _above(os.pipe())
        options = [*OPTIONS, f"--user-data-dir={profile}", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
        null = os.open(os.devnull, os.O_RDWR)
        moves = [(null, 0), (null, 1), (null, 2), (theirs_in, 3), (theirs_out, 4)]
        self._pid = os.posix_spawn(
            program,
            [program, *options, "about:blank"],
            os.environ | {"HOME": str(profile)},
            file_actions=[(os.POSIX_SPAWN_DUP2, source, target) for source, target in moves],
            setsid=True,
        )
        for mine in (null, theirs_in, theirs_out):
            os.close(mine)
        self._rest = b""
        self._n_sent = 0
        self._events: list[dict[str, Any]] = []

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self._commands)
        os.close(self._replies)

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """A command's result. Raises ``BrowserError``."""
        self._n_sent += 1
        message = {"id": self._n_sent, "method": method, "params": params} | ({"sessionId": session} if session else {})
        data = json.dumps(message).encode() + b"\0"
        try:
            while data:
                data = data[os.write(self._commands, data) :]
        except BrokenPipeError as error:
            raise BrowserError("the browser has ended") from error
        deadline_s = SYSTEM.now_s() + PATIENCE_S
        while (reply := self._receive(deadline_s)).get("id") != self._n_sent:
            self._events.append(reply)
        if "error" in reply:
            raise BrowserError(f"{method}: {reply['error']['message']}")
        result: dict[str, Any] = reply["result"]
        return result

    def event(self, method: str, session: str) -> dict[str, Any]:
        """The next event of this kind, which is taken out."""
        deadline_s = SYSTEM.now_s() + PATIENCE_S
        while (found := next((e for e in self._events if _is(e, method, session)), None)) is None:
            self._events.append(self._receive(deadline_s))
        self._events.remove(found)
        params: dict[str, Any] = found["params"]
        return params

    def taken(self, method: str, session: str) -> list[dict[str, Any]]:
        """What has come of this kind so far."""
        self.call("Runtime.evaluate", session, expression="0")  # whatever was said before has come when this has
        return [event["params"] for event in self._events if _is(event, method, session)]

    def page(self) -> Page:
        """A new tab that shares nothing with others."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        return Page(self, target, session)

    def _receive(self, deadline_s: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            left_s = deadline_s - SYSTEM.now_s()
            if left_s <= 0 or not select.select([self._replies], [], [], left_s)[0]:
                raise TimeoutError(f"the browser said nothing for {PATIENCE_S:g} s")
            data = os.read(self._replies, 1 << 20)
            if not data:
                raise BrowserError("the browser has ended")
            self._rest += data
        message, _, self._rest = self._rest.partition(b"\0")
        decoded: dict[str, Any] = json.loads(message)
        return decoded


def _is(event: dict[str, Any], method: str, session: str) -> bool:
    return event.get("method") == method and event.get("sessionId") == session


def _above(pipe: tuple[int, int]) -> tuple[int, int]:
    """The same pipe under numbers from 10 on, closed in whatever is spawned."""
    moved = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in pipe)
    for end in pipe:
        os.close(end)
    return moved[0], moved[1]


class Page:
    """A tab: what a user sees and does, and what its console says."""

    def __init__(self, browser: Browser, target: str, session: str) -> None:
        self._browser, self._target, self._session = browser, target, session
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **params)

    def event(self, method: str) -> dict[str, Any]:
        return self._browser.event(method, self._session)

    def go(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.event("Page.loadEventFired")

    def look(self, expression: str) -> Any:
        """What a script finds; a promise is awaited. Raises ``BrowserError``."""
        done = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in done:
            details = done["exceptionDetails"]
            raise BrowserError(details.get("exception", {}).get("description", details["text"]))
        return done["result"].get("value")

    def until(self, expression: str) -> Any:
        """Waits in the page until the expression is true, and returns it."""
        return self.look(
            "new Promise((done, fail) => { const look = () => { try { const found = " + expression + "; "
            "if (found) done(found); else setTimeout(look, 10); } catch (error) { fail(error); } }; look(); })"
        )

    def text(self, selector: str) -> str:
        """The text of the last element that the selector finds."""
        return str(self.look(f"[...document.querySelectorAll({json.dumps(selector)})].at(-1)?.textContent ?? ''"))

    def count(self, selector: str) -> int:
        return int(self.look(f"document.querySelectorAll({json.dumps(selector)}).length"))

    def click(self, selector: str) -> None:
        """A press of the mouse in the middle of the last element that the selector finds."""
        x, y = self.look(
            f"(() => {{ const it = [...document.querySelectorAll({json.dumps(selector)})].at(-1); "
            "it.scrollIntoView({ block: 'nearest' }); const at = it.getClientRects()[0]; "
            "return [at.x + at.width / 2, at.y + at.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def point(self, selector: str) -> None:
        """Moves the mouse over the last element that the selector finds."""
        x, y = self.look(
            f"(() => {{ const at = [...document.querySelectorAll({json.dumps(selector)})].at(-1).getClientRects()[0]; "
            "return [at.x + at.width / 2, at.y + at.height / 2]; })()"
        )
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def write(self, text: str) -> None:
        """Types into what has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str) -> None:
        code = {"Enter": 13, "Tab": 9, "Escape": 27, "ArrowRight": 39, "ArrowLeft": 37, "Home": 36, "End": 35}[key]
        about = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", **about, **({"text": "\r"} if key == "Enter" else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def set(self, selector: str, value: str) -> None:
        """An input's value, as if it had been typed there."""
        self.look(
            f"(() => {{ const it = document.querySelector({json.dumps(selector)}); it.value = {json.dumps(value)}; "
            "it.dispatchEvent(new Event('input', { bubbles: true })); })()"
        )

    def size(self, width: int, height: int) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def theme(self, name: str) -> None:
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def answer_with(self, pattern: str, body: str) -> None:
        """The next request to such an address gets this stream instead of the server's."""
        self.call("Fetch.enable", patterns=[{"urlPattern": pattern}])
        self._canned = body

    def fulfil(self) -> dict[str, Any]:
        """Gives the stream of ``answer_with`` to the request that waits for it; returns the request."""
        paused = self.event("Fetch.requestPaused")
        headers = [{"name": "content-type", "value": "text/event-stream"}]
        content = base64.b64encode(self._canned.encode()).decode()
        self.call(
            "Fetch.fulfillRequest",
            requestId=paused["requestId"],
            responseCode=200,
            responseHeaders=headers,
            body=content,
        )
        self.call("Fetch.disable")
        request: dict[str, Any] = paused["request"]
        return request

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def complaints(self) -> list[str]:
        """Errors and warnings of the console, but for failed requests, which the browser notes of itself."""
        raised = [e["exceptionDetails"]["text"] for e in self._browser.taken("Runtime.exceptionThrown", self._session)]
        said = [
            " ".join(str(arg.get("value", arg.get("description"))) for arg in event["args"])
            for event in self._browser.taken("Runtime.consoleAPICalled", self._session)
            if event["type"] in ("error", "warning", "assert")
        ]
        entries = [event["entry"] for event in self._browser.taken("Log.entryAdded", self._session)]
        noted = [e["text"] for e in entries if e["source"] != "network" and e["level"] in ("error", "warning")]
        return raised + said + noted

    def close(self) -> None:
        self._browser.call("Target.closeTarget", targetId=self._target)
