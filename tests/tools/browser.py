"""A headless Chromium, told what to do over two pipes by the DevTools protocol: no driver, no socket, no package."""

import base64
import json
import os
import select
import shutil
import subprocess
import time

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for name in NAMES if (path := shutil.which(name))), None)
FLAGS = "headless no-sandbox disable-gpu disable-background-networking no-first-run disable-sync remote-debugging-pipe"
PATIENCE_S = 120


class Browser:
    """One page of one browser; a context manager.

    Args:
        folder: for its profile.
    """

    def __init__(self, folder):
        self._told, words = os.pipe()  # the browser reads what we write
        replies, self._says = os.pipe()
        flags = [f"--{flag}" for flag in FLAGS.split()]
        flags += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={folder}", "about:blank"]
        self._process = subprocess.Popen(
            ["bash", "-c", 'exec "$@" 3<&"$0" 4>&"$WRITES"', str(self._told), CHROMIUM, *flags],
            env=os.environ | {"WRITES": str(self._says)},
            pass_fds=(self._told, self._says),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(self._told)
        os.close(self._says)
        self._words, self._replies, self._rest, self._number = words, replies, b"", 0
        self.events = []
        self._session = None
        try:
            target = self.call("Target.createTarget", url="about:blank")["targetId"]
            self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Network", "Log", "Runtime"):
                self.call(f"{domain}.enable")
        except BaseException:
            self.close()
            raise

    def call(self, method, **arguments):
        """A command of the protocol; returns its result."""
        self._number += 1
        session = {"sessionId": self._session} if self._session else {}
        message = {"id": self._number, "method": method, "params": arguments} | session
        os.write(self._words, json.dumps(message).encode() + b"\0")
        while True:
            reply = self._next()
            if reply.get("id") == self._number:
                assert "error" not in reply, reply
                return reply["result"]
            self.events.append(reply)

    def open(self, url, *, width, scheme):
        """Load a page at a width, in a colour scheme, and wait until it is there."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.events.clear()
        self.call("Page.navigate", url=url)
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())

    def value(self, expression):
        """Of a JavaScript expression."""
        reply = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in reply, reply
        return reply["result"].get("value")

    def screenshot(self, path, *, most=16_000):
        """Of the whole page, PNG."""
        height = min(most, self.value("document.documentElement.scrollHeight"))
        clip = {"x": 0, "y": 0, "width": self.value("innerWidth"), "height": height, "scale": 1}
        reply = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(reply["data"]))

    def requests(self):
        """URLs that the page asked for, itself included."""
        return [event["params"]["request"]["url"] for event in self._of("Network.requestWillBeSent")]

    def complaints(self):
        """What its console would show."""
        return self._of("Log.entryAdded") + self._of("Runtime.consoleAPICalled") + self._of("Runtime.exceptionThrown")

    def _of(self, method):
        return [event for event in self.events if event.get("method") == method]

    def _next(self):
        deadline = time.monotonic() + PATIENCE_S
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._replies], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, "the browser says nothing"
            data = os.read(self._replies, 2**20)
            assert data, "the browser has gone"
            self._rest += data
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def close(self):
        """End the browser."""
        os.close(self._words)
        os.close(self._replies)
        try:
            self._process.wait(timeout=20)  # it ends where its pipes do
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
