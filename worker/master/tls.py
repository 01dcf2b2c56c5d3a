"""Whom to believe on a TLS connection, and what to show of ourselves."""

from __future__ import annotations

import logging
import ssl
from pathlib import Path

from worker.errors import ConfigError

logger = logging.getLogger(__name__)


def client_context(
    *,
    ca: Path | None = None,
    cert: Path | None = None,
    key: Path | None = None,
    insecure: bool = False,
) -> ssl.SSLContext:
    """A context for connections to the master: TLS 1.2 or newer, verified.

    ``ca``
        PEM file of what to trust *instead of* the system's authorities: an authority's
        certificate, or the master's own one, self-signed or not (it is pinned then).
    ``cert``, ``key``
        PEM files of a client certificate (its chain may follow in the same file) and of its
        private key; without ``key``, ``cert`` must hold both.
    ``insecure``
        Verify nothing. Logged as a warning.

    Raises ConfigError naming the file that cannot be used.
    """
    if key is not None and cert is None:
        raise ConfigError(f"--key {key}: a key needs its certificate too; set --cert")
    context = ssl.create_default_context() if ca is None else _trusting(ca)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # A name counts only where certificates have names (RFC 9525, 6.3).
    context.hostname_checks_common_name = False
    if cert is not None:
        _load_client_certificate(context, cert, key)
    if insecure:
        logger.warning(
            "TLS certificates are NOT verified (--insecure-skip-verify): whoever is on the way "
            "can read the API key and hand out jobs. Use --ca with the master's certificate."
        )
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


class Renewal:
    """Takes up certificates that were replaced on the disk while the program runs.

    New connections use them; a certificate that is trusted no more is so after a restart.
    """

    def __init__(
        self, context: ssl.SSLContext, *, ca: Path | None, cert: Path | None, key: Path | None
    ) -> None:
        self._context = context
        self._ca = ca
        self._cert = cert
        self._key = key
        self._seen = self._state()

    def look(self) -> None:
        """Load what has changed; called when a connection failed."""
        state = self._state()
        if state == self._seen:
            return
        try:
            if self._ca is not None:
                self._context.load_verify_locations(cadata=_read("--ca", self._ca))
            if self._cert is not None:
                _load_client_certificate(self._context, self._cert, self._key)
        except (ConfigError, ssl.SSLError, ValueError) as error:
            logger.warning("the changed TLS files cannot be used (yet): %s", error)
            return
        self._seen = state
        logger.info("the TLS files have changed and are in use from now on")

    def _state(self) -> list[tuple[int, int, int] | None]:
        return [_identity(path) for path in (self._ca, self._cert, self._key) if path is not None]


def _identity(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _trusting(ca: Path) -> ssl.SSLContext:
    text = _read("--ca", ca)
    try:
        if not text:  # which Python takes for "none named", and trusts the system's instead
            raise ValueError("empty file")
        context = ssl.create_default_context(cadata=text)
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError(
            f"--ca {ca}: holds no usable PEM certificate ({_plain(error)}); "
            "expected is the authority's certificate or the master's own"
        ) from error
    # A certificate that is no authority's and was signed by someone else ends the chain as
    # well, see X509_V_FLAG_PARTIAL_CHAIN in X509_VERIFY_PARAM_set_flags(3). Python 3.13 sets
    # this by default, and with it a strictness that many an in-house authority fails; what
    # the operator handed us by name is trusted alike with every Python.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return context


def _load_client_certificate(context: ssl.SSLContext, cert: Path, key: Path | None) -> None:
    _read("--cert", cert)
    if key is not None:
        _read("--key", key)
    holder = f"--key {key}" if key is not None else f"--cert {cert}"

    def no_password() -> str:
        # Without this OpenSSL asks on the terminal, and a service waits for ever.
        raise ConfigError(f"{holder}: the private key is encrypted; it must be without passphrase")

    try:
        context.load_cert_chain(cert, key, password=no_password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ConfigError(f"{holder}: this key does not belong to --cert {cert}") from error
        raise ConfigError(
            f"--cert {cert}, {holder}: no usable PEM certificate with its private key "
            f"({_plain(error)})"
        ) from error


def _read(option: str, path: Path) -> str:
    try:
        # PEM is ASCII; what else stands around it (names in a bundle) is comment.
        return path.read_bytes().decode("ascii", "ignore")
    except OSError as error:
        raise ConfigError(f"{option} {path}: cannot be read: {error.strerror}") from error


def _plain(error: Exception) -> str:
    reason = error.reason if isinstance(error, ssl.SSLError) else None
    return reason.lower().replace("_", " ") if reason else str(error)
