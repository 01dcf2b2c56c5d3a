"""One family of errors. Each says what happened, to what, and what to do about it."""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """Why a job failed, as the master's users know it.

    The reason travels as ``metrics.failure_reason`` and as the first word of ``error``.
    """

    CAPABILITY_MISMATCH = "capability_mismatch"
    USER_ERROR = "user_error"
    INPUT_ERROR = "input_error"
    NETWORK_ERROR = "network_error"
    RESOURCE_ERROR = "resource_error"
    TIMEOUT = "timeout"
    RUNTIME_ERROR = "runtime_error"
    PLATFORM_ERROR = "platform_error"


class WorkerError(Exception):
    """Base of all errors this program raises on purpose.

    ``exit_status`` is what the command line exits with when nothing handles the error.
    """

    exit_status = 1


class ConfigError(WorkerError):
    """A configuration value cannot be used. Names the key, the value and what is accepted."""

    exit_status = 2


class LedgerError(WorkerError):
    """The ledger of accepted jobs cannot be opened, read or written. Names the file."""


class JobError(WorkerError):
    """This job alone cannot go on. ``reason`` says whose fault it is."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


class SystemdError(WorkerError):
    """A call to systemd failed. ``name`` is the D-Bus error name, empty if there was none."""

    def __init__(self, message: str, name: str = "") -> None:
        super().__init__(message)
        self.name = name


class BusGone(SystemdError):
    """The bus connection is down, so whether the call had an effect is not known."""


class BusTimeout(SystemdError):
    """No answer within the time limit, so whether the call had an effect is not known."""


class UnitExists(SystemdError):
    """A unit of that name is already loaded."""


class NoSuchUnit(SystemdError):
    """No unit of that name is loaded. Fine in a clean-up."""


class PropertyRejected(SystemdError):
    """The running systemd does not know, or does not let us set, ``property_name``."""

    def __init__(self, message: str, name: str, property_name: str) -> None:
        super().__init__(message, name)
        self.property_name = property_name


class MasterError(WorkerError):
    """A request to the master failed."""


class MasterUnreachable(MasterError):
    """No complete answer came: refused, timed out, TLS failure, or the connection broke.

    ``sent`` is False only when the request surely never reached the master.
    ``retry_after`` is in seconds, where the master named a delay (RFC 9110, Retry-After).
    """

    def __init__(
        self, message: str, *, sent: bool = True, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.sent = sent
        self.retry_after = retry_after


class MasterRefused(MasterError):
    """The master answered with an error status, or with something that is not the protocol."""

    def __init__(
        self, message: str, status: int, body: str = "", retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = body
        self.retry_after = retry_after


class Unauthorized(MasterRefused):
    """401 or 403: the API key is missing or wrong. Asking again soon will not help."""


class NodeUnknown(MasterRefused):
    """The master does not know our node id (any more): register again."""


class JobUnknown(MasterRefused):
    """The master does not know this job."""
