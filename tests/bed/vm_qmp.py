"""qemu's own control socket: the few commands that the virtual machines need.

The protocol is qemu's QMP, one JSON document a line; docs/interop/qmp-spec in qemu.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bed_kernel import BedError

_SAVE_TIMEOUT_SEC = 180.0


class Qmp:
    """A connection to a running qemu. Every wait is bounded by `timeout` seconds."""

    def __init__(self, path: Path, timeout: float) -> None:
        """Raises OSError where nobody answers at `path` in time."""
        deadline = time.monotonic() + timeout
        while True:
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.settimeout(timeout)
            try:
                self._socket.connect(str(path))
                break
            except OSError:
                self._socket.close()
                # qemu makes the socket a moment after it has been started, without an event.
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
        self._file = self._socket.makefile("rw")
        try:
            self._file.readline()  # the greeting
            self.command("qmp_capabilities")
        except BaseException:
            self._close()
            raise

    def command(self, name: str, **arguments: Any) -> Any:
        """Have a command executed; its answer. Raises BedError where qemu refuses it."""
        self._file.write(json.dumps({"execute": name, "arguments": arguments}) + "\n")
        self._file.flush()
        while line := self._file.readline():
            message = json.loads(line)
            if "error" in message:
                raise BedError(f"qemu refuses {name}: {message['error']['desc']}")
            if "return" in message:
                return message["return"]
        raise ConnectionResetError("qemu has ended")

    def save(self, target: Path) -> None:
        """Stop the machine and write its state to `target`. Raises BedError."""
        self.command("stop")
        self.command("migrate-set-parameters", **{"max-bandwidth": 10**11})
        self.command("migrate", uri=f"exec:cat >{shlex.quote(str(target))}")
        deadline = time.monotonic() + _SAVE_TIMEOUT_SEC
        while True:
            status = self.command("query-migrate").get("status")
            if status == "completed":
                return
            if status in ("failed", "cancelled") or time.monotonic() > deadline:
                raise BedError(f"the state of the virtual machine cannot be saved ({status})")
            time.sleep(0.05)

    def resume(self, timeout: float) -> None:
        """Let the machine go on, once its saved state has been read. Raises BedError."""
        deadline = time.monotonic() + timeout
        while self.command("query-status")["status"] == "inmigrate":
            if time.monotonic() > deadline:
                raise BedError(f"the saved state was not read within {timeout:.0f} s")
            time.sleep(0.02)
        self.command("cont")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def _close(self) -> None:
        # What is still to be sent cannot be where qemu has ended.
        with contextlib.suppress(OSError):
            self._file.close()
        self._socket.close()
