"""A headless Chromium, spoken to through two pipes, and the files of a folder for it."""

from __future__ import annotations

import contextlib
import functools
import http.server
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SECONDS = 120.0
# gives two descriptors the numbers 3 and 4, whichever they have, and becomes the program that is named
_START = """
import fcntl, os, sys
apart = [fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3]]
for number, descriptor in enumerate(apart, 3):
    os.dup2(descriptor, number)
os.execvp(sys.argv[3], sys.argv[3:])
"""


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a server, on this machine alone, of the files in a folder."""
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


class Browser:
    """Speaks Chromium's debugging protocol: JSON messages that end with a zero byte, on its descriptors 3 and 4."""

    def __init__(self, program: str, profile: Path) -> None:
        its_input, self._out = os.pipe()
        self._in, its_output = os.pipe()
        arguments = [program, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe",
                     f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, str(its_input), str(its_output), *arguments],
            pass_fds=(its_input, its_output), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(its_input)
        os.close(its_output)
        self._rest, self._calls = b"", 0

    def close(self) -> None:
        """End the browser."""
        os.close(self._out)
        self._process.terminate()
        self._process.wait(30)
        os.close(self._in)

    def result(self, address: str) -> tuple[str, str]:
        """(state, text) of the page's element `result` once it is not running any more."""
        target = self._call("Target.createTarget", url=address)["targetId"]
        session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        look = "(r => r ? [r.dataset.state, r.textContent] : null)(document.getElementById('result'))"
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            found = self._call("Runtime.evaluate", session, expression=look, returnByValue=True)
            value = found.get("result", {}).get("value")
            if value is not None and value[0] != "running":
                self._call("Target.closeTarget", targetId=target)
                return value[0], value[1]
            time.sleep(0.1)
        raise TimeoutError(f"{address} was still running after {SECONDS:.0f} s")

    def _call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        self._calls += 1
        message = {"id": self._calls, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._rest:
                piece = os.read(self._in, 1 << 16)
                if not piece:
                    raise RuntimeError("the browser ended")
                self._rest += piece
            text, self._rest = self._rest.split(b"\0", 1)
            answer = json.loads(text)
            if answer.get("id") == self._calls:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                found: dict[str, Any] = answer["result"]
                return found
