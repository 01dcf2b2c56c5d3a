"""From what the operator wrote, in up to four places, to ``Settings``.

The API key has two places more. In order: the flag, the environment, the file that
``MASTER_API_KEY_FILE`` names (wherever that is written), the credential, the ``--config`` file.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from urllib.parse import urlsplit

from worker.config.envfile import EnvFile, EnvFileError, parse_env
from worker.config.keyfile import read_key_file
from worker.config.keys import KEYS, Key
from worker.config.parsers import parse_key_file, parse_node_name
from worker.config.settings import Settings
from worker.errors import ConfigError

CREDENTIAL = "master-api-key"
"""Name of the credential that holds the API key (systemd.exec(5), ``LoadCredential=``)."""
PLACEHOLDER_KEY = "your-api-key-here"
_LARGEST_FILE = 1 << 20
_SHOWN = 120
"""Characters of a wrong value that an error text repeats."""
_KEY_FILE = next(key for key in KEYS if key.field == "master_api_key_file")
_USER_INFO = re.compile(r"//.*@")
"""Name and password in a URL, which no error text may repeat."""


@dataclass(frozen=True, slots=True)
class Resolved:
    settings: Settings
    sources: Mapping[str, str]
    """For each field of ``Settings``, where its value comes from."""
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Written:
    """One value as somebody wrote it."""

    where: str
    text: str
    rank: int
    """Lower is stronger: flag 0, environment 1, key file or credential 2, ``--config`` file 3."""


def resolve(
    flags: Mapping[str, str],
    environ: Mapping[str, str],
    *,
    config_file: str = "",
    need_master: bool = True,
) -> Resolved:
    """Read every key from the strongest place that gives it a value; empty is no value.

    ``flags`` maps flags (``--master``) to their text. Raises ConfigError, one line for each
    wrong value, with all of them, and the warnings after them.
    """
    errors: list[str] = []
    warnings: list[str] = []
    env_file = EnvFile()
    unread = False
    if config_file:
        try:
            env_file = _read(Path(config_file), warnings)
        except ConfigError as error:
            errors.append(str(error))
            unread = True  # what is missing may stand in it

    values: dict[str, object] = {}
    sources: dict[str, str] = {}
    for key in KEYS:
        written = _chosen(_places(key, flags, environ, env_file, config_file, errors))
        if written is None:
            continue
        try:
            value = key.parse(written.text)
        except ValueError as error:
            errors.append(_wrong(key, written, str(error)))
            # so that nothing is said to be missing that is only wrong
            sources[key.field] = written.where
            continue
        if key.field:
            values[key.field] = value
            sources[key.field] = written.where
        elif value is False:
            warnings.append(f"{written.where}: has no effect, it is always so")
        if key.secret and written.rank == 0:
            warnings.append(
                f"{key.flag}: every local user can see the key in the list of processes; "
                f"put it into a file ({key.names[0]}_FILE), the environment ({key.names[0]}) or "
                f"the credential {CREDENTIAL}"
            )

    _node_name(values, sources, errors)
    errors += _together(sources, need_master=need_master and not unread)
    if errors:
        # with the warnings: a key that is not known may be the one that is missing, misspelt
        raise ConfigError("\n".join([*errors, *(f"warning: {text}" for text in warnings)]))
    settings = Settings.model_validate(values)
    if need_master:
        warnings += _master_warnings(settings)
    key_source = sources.get("master_api_key", "")
    if settings.master_api_key_file and not key_source.startswith("key file "):
        warnings.append(
            f"MASTER_API_KEY_FILE has no effect: {key_source} comes first; "
            "take the one or the other out"
        )
    for field in Settings.model_fields:
        sources.setdefault(field, "default")
    return Resolved(settings, MappingProxyType(sources), tuple(warnings))


def _chosen(places: Iterator[_Written]) -> _Written | None:
    """The strongest; a placeholder counts only where there is nothing else."""
    placeholder = None
    for written in places:
        if written.text != PLACEHOLDER_KEY:
            return written
        placeholder = placeholder or written
    return placeholder


def _places(
    key: Key,
    flags: Mapping[str, str],
    environ: Mapping[str, str],
    env_file: EnvFile,
    config_file: str,
    errors: list[str],
) -> Iterator[_Written]:
    """What was written for this key, the strongest first."""
    if text := flags.get(key.flag, ""):
        yield _Written(key.flag, text, 0)
    for name in key.names:
        if text := environ.get(name, ""):
            yield _Written(f"environment variable {name}", text, 1)
    if key.secret:
        yield from _key_file(flags, environ, env_file, config_file, errors)
    if key.secret and (directory := environ.get("CREDENTIALS_DIRECTORY", "")):
        path = Path(directory) / CREDENTIAL
        try:
            text = path.read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            text = ""
        except (OSError, ValueError) as error:
            errors.append(f"credential {path}: cannot be read: {_reason(error)}")
            text = ""
        if text:
            yield _Written(f"credential {path}", text, 2)
    for name in key.names:
        assignment = env_file.assignments.get(name)
        if assignment and assignment.value:
            yield _Written(f"{config_file}:{assignment.line}: {name}", assignment.value, 3)


def _key_file(
    flags: Mapping[str, str],
    environ: Mapping[str, str],
    env_file: EnvFile,
    config_file: str,
    errors: list[str],
) -> Iterator[_Written]:
    """The API key from the file that the operator names for it."""
    named = next(_places(_KEY_FILE, flags, environ, env_file, config_file, errors), None)
    if named is None:
        return
    try:
        path = parse_key_file(named.text)
    except ValueError:
        return  # said where that key itself is read
    try:
        yield _Written(f"key file {path}", read_key_file(path), 2)
    except ValueError as error:
        errors.append(f"{named.where}: {path} {error}")


def _wrong(key: Key, written: _Written, accepted: str) -> str:
    if key.secret:
        return f"{written.where}: {accepted} (the value is not shown)"
    text = _USER_INFO.sub("//…@", written.text)
    shown = repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "…")
    hint = "; a comment needs a line of its own" if written.rank == 3 and " #" in text else ""
    return f"{written.where}: {shown} {accepted}{hint}"


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or "it is not UTF-8 text"


def _read(path: Path, warnings: list[str]) -> EnvFile:
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read(_LARGEST_FILE + 1)
        if len(data) > _LARGEST_FILE:
            raise ConfigError(f"--config {path}: is larger than 1 MiB: is it the right file?")
        env_file = parse_env(data.decode("utf-8-sig"))
    except EnvFileError as error:
        raise ConfigError(f"--config {path}: {error}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--config {path}: cannot be read: {_reason(error)}; name a file of KEY=value lines"
        ) from None

    warnings += [f"{path}: {sentence}" for sentence in env_file.ignored]
    known = {name: key for key in KEYS for name in key.names}
    for name, assignment in env_file.assignments.items():
        if name not in known:
            warnings.append(f"{path}:{assignment.line}: {name} is not known and has no effect")
        elif known[name].secret and mode & stat.S_IROTH:
            warnings.append(f"{path}: every local user can read the key in it; chmod 600 it")
    return env_file


def _node_name(values: dict[str, object], sources: dict[str, str], errors: list[str]) -> None:
    """The host's name where no other is given, as it is: it is our identity at the master."""
    if "node_name" in sources:
        return
    name = socket.gethostname()
    try:
        values["node_name"] = parse_node_name(name)
    except ValueError:
        errors.append(f"NODE_NAME (--node-name) must be given: the host is called {name!r}")


def _together(sources: Mapping[str, str], *, need_master: bool) -> Iterator[str]:
    """What is wrong with the values side by side."""
    if need_master and "master_url" not in sources:
        yield (
            "MASTER_URL is missing: give --master URL, or set MASTER_URL in the environment "
            "or in the file that --config names"
        )
    for one, other in (("cert", "key"), ("key", "cert")):
        if one in sources and other not in sources:
            yield f"{sources[one]}: --cert and --key belong together, give --{other} as well"


def _master_warnings(settings: Settings) -> Iterator[str]:
    url = urlsplit(settings.master_url)
    key = settings.master_api_key
    loopback = _loopback(url.hostname or "")
    if url.scheme == "http" and key is not None and not loopback:
        yield "the API key travels unencrypted: MASTER_URL is http://, use https://"
    if key is not None and key.get_secret_value() == PLACEHOLDER_KEY:
        yield "MASTER_API_KEY is the placeholder still; put the master's key in"
    if settings.insecure_skip_verify:
        yield (
            "INSECURE_SKIP_VERIFY is on: anybody on the way can pose as the master and give "
            "this machine jobs; use --ca FILE"
        )
    if loopback:
        yield "the master is this machine: its own work and the jobs share one set of CPUs"


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
