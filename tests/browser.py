"""Chromium without a window, driven by its DevTools protocol: messages of JSON, each ended by a zero byte, on two pipes."""
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--disable-background-networking",
         "--no-first-run", "--disable-component-update", "--hide-scrollbars", "--disable-dev-shm-usage"]
# The pipes are moved to the numbers that the browser reads and writes.
START = """import os, sys
os.dup2(int(sys.argv[1]), 3), os.dup2(int(sys.argv[2]), 4)
os.execvp(sys.argv[3], sys.argv[3:])"""
WAIT = 60  # seconds, on a busy machine


class Browser:
    """One browser process with one page. `problems` are console errors, `requests` the addresses that the page asked for."""

    def __init__(self, profile):
        theirs_in, self.out = (fcntl.fcntl(fd, fcntl.F_DUPFD, 20) for fd in os.pipe())
        self.inp, theirs_out = (fcntl.fcntl(fd, fcntl.F_DUPFD, 20) for fd in os.pipe())
        command = [sys.executable, "-c", START, str(theirs_in), str(theirs_out), PROGRAM, *FLAGS, f"--user-data-dir={profile}"]
        self.process = subprocess.Popen(command, pass_fds=(theirs_in, theirs_out), stderr=subprocess.DEVNULL,
                                        stdout=subprocess.DEVNULL)
        os.close(theirs_in), os.close(theirs_out)
        self.buffer, self.number, self.session = b"", 0, None
        self.problems, self.requests, self.events = [], [], []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def close(self):
        self.process.terminate()
        self.process.wait(20)
        os.close(self.out), os.close(self.inp)

    def call(self, method, **params):
        """Send a command and wait for its result."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + WAIT
        while True:
            answer = self.read(deadline)
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def read(self, deadline):
        """The next message; what the page reports is kept on the way."""
        while b"\0" not in self.buffer:
            if not select.select([self.inp], [], [], max(0, deadline - time.monotonic()))[0]:
                raise TimeoutError("the browser does not answer")
            self.buffer += os.read(self.inp, 1 << 20)
        text, _, self.buffer = self.buffer.partition(b"\0")
        message = json.loads(text)
        event, params = message.get("method"), message.get("params", {})
        if (event == "Runtime.exceptionThrown" or event == "Log.entryAdded" and params["entry"]["level"] == "error"
                or event == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert")):
            self.problems.append(str(params))
        if event == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        self.events.append(event)
        return message

    def load(self, method, **params):
        """Send a command that loads a page, and wait until it is there."""
        self.problems, self.requests, self.events = [], [], []
        self.call(method, **params)
        while "Page.loadEventFired" not in self.events:
            self.read(time.monotonic() + WAIT)

    def open(self, path, width, height, dark=False):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.load("Page.navigate", url=path.resolve().as_uri())

    def js(self, expression):
        """The value of a JavaScript expression."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"]["exception"].get("description"))
        return result["result"].get("value")

    def wait_for(self, expression):
        wait_until(lambda: self.js(expression), expression)

    def press(self, key):
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)


def wait_until(true, what="what was waited for"):
    """Until a function of ours says so."""
    deadline = time.monotonic() + WAIT
    while not true():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not come")
        time.sleep(.05)
