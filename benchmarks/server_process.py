"""A server in a process of its own, as people start it: `python -m serve.server`."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


class ServerProcess:
    """`python -m serve.server` on a free loopback port; its log is kept.

    As a context it stops the server at the end, by force if it has to.
    """

    def __init__(self, *arguments: str | os.PathLike[str], timeout: float = 240):
        """Starts the server and waits until it listens, which is before it is ready.

        Args:
          arguments: of the command line, but for the port.
          timeout: seconds until it listens.
        """
        command = [sys.executable, "-m", "serve.server", *map(str, arguments), "--port", "0"]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        self.lines: list[str] = []
        self._arrived = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            self.url = self.wait_for(r'address[=": ]+([^\s"]+)', timeout).group(1)
        except OSError:
            self.process.kill()
            raise

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._arrived:
                self.lines.append(line)
                self._arrived.notify_all()

    def wait_for(self, pattern: str, timeout: float = 240) -> re.Match[str]:
        """The first line of the log that has it.

        Raises:
          OSError: the server ended, or the time-out came, without such a line.
        """
        end = time.monotonic() + timeout
        with self._arrived:
            while True:
                for line in self.lines:
                    if found := re.search(pattern, line):
                        return found
                gone = self.process.poll() is not None
                if gone or not self._arrived.wait(min(1.0, max(0.0, end - time.monotonic()))):
                    if gone or time.monotonic() > end:
                        log = "".join(self.lines)
                        raise OSError(f"no {pattern!r} in the log of the server:\n{log}")

    def wait_until_ready(self, timeout: float = 240) -> None:
        """Waits until everything is compiled and requests are taken.

        Raises:
          OSError: the server ended, or the time-out came, before that.
        """
        self.wait_for(r"\bready\b.*trees", timeout)

    def text(self) -> str:
        """The log so far."""
        with self._arrived:
            return "".join(self.lines)

    def stop(self, *, seconds: float = 60) -> int:
        """SIGTERM, and the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(seconds)
        self._reader.join(10)
        assert self.process.stderr is not None
        self.process.stderr.close()
        return code

    def __enter__(self) -> "ServerProcess":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.stop()
        finally:
            self.process.kill()
