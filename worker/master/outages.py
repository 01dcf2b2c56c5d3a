"""Why no answer came, said so that an operator knows what to look at."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator

import httpx

from worker.errors import MasterError, MasterRefused, MasterUnreachable, Unauthorized

# In these cases not a byte of the request has left; in all others nobody can know.
_NEVER_SENT = (
    httpx.ConnectError,
    httpx.ConnectTimeout,
    httpx.PoolTimeout,
    httpx.UnsupportedProtocol,
)

_LONGEST_REASON = 100
_VERIFY_HOSTNAME = 62  # X509_V_ERR_HOSTNAME_MISMATCH
_VERIFY_ADDRESS = 64  # X509_V_ERR_IP_ADDRESS_MISMATCH
_VERIFY_EXPIRED = 10  # X509_V_ERR_CERT_HAS_EXPIRED; see openssl-verification-options(1)
_VERIFY_NOT_YET = 9  # X509_V_ERR_CERT_NOT_YET_VALID


def unreachable(error: httpx.RequestError | OSError, peer: str, *, tls: bool) -> MasterUnreachable:
    """The error to raise in place of httpx's. ``peer`` is the master's host:port.

    Nothing that the master sent is in it.
    """
    cause = _cause(error)
    if tls and any(isinstance(e, ConnectionResetError) for e in _dig(error)):
        # TLS 1.3 refuses a client after the client's handshake is over, and the alert that
        # says so is lost when the connection is closed with our request unread.
        cause += "; if the master wants a client certificate, set --cert and --key"
    return MasterUnreachable(
        f"no answer from the master at {peer}: {cause}",
        sent=not isinstance(error, _NEVER_SENT),
    )


def in_our_words(error: MasterError, peer: str) -> str:
    """What an error means, without a word of the master's: a whole network may read /ready."""
    if isinstance(error, Unauthorized):
        return f"the master at {peer} refused the API key ({error.status}); check MASTER_API_KEY"
    if isinstance(error, MasterRefused):
        return (
            f"the master at {peer} did not answer as it should (status {error.status}); the "
            "worker's log has what it said"
        )
    return str(error)


def _cause(error: Exception) -> str:
    """The plain cause, which httpx buries under two or three layers of its own."""
    buried = list(_dig(error))
    for cause in buried:
        if isinstance(cause, ssl.SSLWantReadError | ssl.SSLWantWriteError):
            continue  # how TLS says "wait", on the way to what went wrong
        if isinstance(cause, ssl.SSLError):
            return _tls_cause(cause)
        if isinstance(cause, socket.gaierror):
            return f"the host name cannot be resolved ({cause.strerror})"
    match error:
        case httpx.ConnectTimeout():
            return "connecting timed out; is the host up, and does a firewall drop packets?"
        case httpx.PoolTimeout():
            return "too many requests are under way"
        case httpx.TimeoutException():
            return "it accepted the connection, but took too long to answer"
        case httpx.RemoteProtocolError():
            # What follows the colon is what the master sent, as long as that is.
            what = str(error).partition(":")[0]
            return f"the connection broke, or it does not speak HTTP ({what[:_LONGEST_REASON]})"
    for cause in buried:
        if isinstance(cause, ConnectionRefusedError):
            return "connection refused; is the master running, and is the port right?"
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
    return str(error) or "the connection broke"


def _tls_cause(error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        why = error.verify_message or "not valid"
        if error.verify_code in (_VERIFY_HOSTNAME, _VERIFY_ADDRESS):
            return (
                f"its TLS certificate is for another name ({why}); "
                "use a name in MASTER_URL that the certificate lists"
            )
        if error.verify_code in (_VERIFY_EXPIRED, _VERIFY_NOT_YET):
            return f"its TLS certificate is out of date ({why}); renew it, or set the clock"
        return (
            f"its TLS certificate is not trusted ({why}); "
            "name the certificate, or the authority's, with --ca"
        )
    reason = error.reason or ""
    if reason in {"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST"}:
        return "it does not speak TLS; if it is meant to be plain, MASTER_URL begins with http://"
    if "CERTIFICATE_REQUIRED" in reason:
        return "it wants a client certificate; set --cert and --key"
    if "ALERT" in reason and ("CERTIFICATE" in reason or "UNKNOWN_CA" in reason):
        return (
            f"it refused our client certificate ({_spoken(reason)}); "
            "check --cert and --key, and the authority that the master trusts"
        )
    if "ALERT_HANDSHAKE_FAILURE" in reason:
        return "the TLS handshake failed; if it wants a client certificate, set --cert and --key"
    if "PROTOCOL" in reason:
        return f"no common TLS version ({_spoken(reason)}); 1.2 or newer is needed"
    return f"TLS failed ({_spoken(reason) or error})"


def _spoken(reason: str) -> str:
    return reason.lower().replace("_", " ")


def _dig(error: BaseException) -> Iterator[BaseException]:
    """The error and all that lie under it; each once, for chains can be circular."""
    seen: set[int] = set()
    heap: list[BaseException] = [error]
    while heap:
        top = heap.pop(0)
        if id(top) in seen:
            continue
        seen.add(id(top))
        yield top
        heap.extend(e for e in (top.__cause__, top.__context__) if e is not None)
        if isinstance(top, BaseExceptionGroup):
            heap.extend(top.exceptions)
