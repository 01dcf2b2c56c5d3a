"""Files of ``KEY=value`` lines, read as systemd's ``EnvironmentFile=`` reads them.

The same file then means the same whether systemd hands it to us as environment or ``--config``
names it. Syntax: systemd.exec(5), ``EnvironmentFile=``. Differences: a quote that is never closed
is an error here, as it would swallow the rest of the file, and lines that systemd passes over in
silence are reported as warnings.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_BLANK = " \t\r"


class EnvFileError(ValueError):
    """The text is no environment file; the message starts with the line's number."""


@dataclass(frozen=True, slots=True)
class Assignment:
    value: str
    line: int


@dataclass(slots=True)
class EnvFile:
    """What a file says: of a key that is set twice, the last value."""

    assignments: dict[str, Assignment] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    """One sentence for each line that was passed over."""


def parse_env(text: str) -> EnvFile:
    """Raises EnvFileError."""
    result = EnvFile()
    position, line = 0, 1
    while position < len(text):
        end = text.find("\n", position)
        end = len(text) if end < 0 else end
        head = text[position:end].strip(_BLANK)
        if not head or head[0] in "#;":
            position, line = end + 1, line + 1
            continue
        key, equals, _ = text[position:end].partition("=")
        if not equals:
            result.ignored.append(f"line {line}: no '=' in it, so it was passed over")
            position, line = end + 1, line + 1
            continue
        value, after = _value(text, position + len(key) + 1, line)
        _assign(result, key.strip(_BLANK), value, line)
        line += text.count("\n", position, after)
        position = after
    return result


def _assign(result: EnvFile, key: str, value: str, line: int) -> None:
    if _NAME.fullmatch(key):
        result.assignments[key] = Assignment(value, line)
    elif key.startswith("export "):
        result.ignored.append(f"line {line}: passed over, write it without 'export'")
    else:
        result.ignored.append(f"line {line}: passed over, {key!r} is no name of a variable")


def _value(text: str, start: int, line: int) -> tuple[str, int]:
    """The value that starts there, and where the next line begins."""
    out: list[str] = []
    kept = 0  # characters of ``out`` that trailing blanks may not be cut from
    plain = False  # inside an unquoted value, where quotes mean themselves
    position = start
    while position < len(text):
        char = text[position]
        if char == "\n":
            position += 1
            break
        if char in "'\"" and not plain:
            quoted, position = _quoted(text, position, line)
            out += quoted
            kept = len(out)
            continue
        if char == "\\":
            following = text[position + 1 : position + 2]
            if following != "\n":
                out += following
                kept = len(out)
                plain = True
            position += 2
            continue
        if plain or char not in _BLANK:
            plain = True
            out.append(char)
        position += 1
    while len(out) > kept and out[-1] in _BLANK:
        out.pop()
    return "".join(out), position


def _quoted(text: str, start: int, line: int) -> tuple[str, int]:
    """What stands between the quotes, and the position after the closing one."""
    quote = text[start]
    out: list[str] = []
    position = start + 1
    while position < len(text):
        char = text[position]
        if char == quote:
            return "".join(out), position + 1
        if char == "\\" and quote == '"':
            following = text[position + 1 : position + 2]
            if following in ('"', "\\", "`", "$"):
                out.append(following)
            elif following != "\n":
                out.append(char + following)
            position += 2
            continue
        out.append(char)
        position += 1
    raise EnvFileError(f"line {line}: the quote {quote} is never closed")
