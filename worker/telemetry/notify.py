"""Telling systemd how we are: sd_notify(3), without libsystemd."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping

from worker.printable import escape

logger = logging.getLogger(__name__)


class Notifier:
    """Sends to $NOTIFY_SOCKET; without that variable every method does nothing.

    No method raises: a message that cannot be sent is logged, the first time.
    """

    def __init__(self, environ: Mapping[str, str] | None = None) -> None:
        environ = os.environ if environ is None else environ
        self._address = _address(environ.get("NOTIFY_SOCKET", ""))
        self._failed = False
        self.watchdog_seconds = _watchdog(environ, os.getpid()) if self._address else None
        """Time within which systemd wants a ``watchdog()``; None: it wants none.

        Half of it is a good pace (sd_watchdog_enabled(3)).
        """

    @property
    def enabled(self) -> bool:
        return bool(self._address)

    def ready(self, status: str = "") -> None:
        """Start-up, or a reload, is done."""
        self._send("READY=1", *_status(status))

    def status(self, status: str) -> None:
        """One line for ``systemctl status``."""
        self._send(*_status(status))

    def stopping(self, status: str = "") -> None:
        self._send("STOPPING=1", *_status(status))

    def watchdog(self) -> None:
        """We are alive; see ``watchdog_seconds``."""
        self._send("WATCHDOG=1")

    def extend_timeout(self, seconds: float) -> None:
        """Start-up or shutdown needs up to this long from now; may be said again and again."""
        self._send(f"EXTEND_TIMEOUT_USEC={int(seconds * 1_000_000)}")

    def _send(self, *assignments: str) -> None:
        if not self._address or not assignments:
            return
        data = "\n".join(assignments).encode("utf-8", "replace")
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
                channel.setblocking(False)  # a full socket must not stop the event loop
                channel.sendto(data, self._address)
        except OSError as error:
            log = logger.debug if self._failed else logger.warning
            self._failed = True
            log("systemd could not be told %s: %s", assignments[0], error)


def _address(text: str) -> str:
    """For sendto(): a path as it is, an abstract name (``@name``) with a leading NUL."""
    if text.startswith("@"):
        return "\0" + text[1:]
    if text and not text.startswith("/"):
        logger.warning("$NOTIFY_SOCKET is %r, which is no UNIX socket: not used", text)
        return ""
    return text


def _watchdog(environ: Mapping[str, str], pid: int) -> float | None:
    """sd_watchdog_enabled(3): the time counts only for the process that it was meant for."""
    usec, owner = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", "")
    if not usec.isdecimal() or int(usec) == 0 or (owner and owner != str(pid)):
        return None
    return int(usec) / 1_000_000


def _status(status: str) -> list[str]:
    # a line break would start another assignment
    return [f"STATUS={escape(' '.join(status.split()))}"] if status else []
