"""Text from elsewhere, made safe to print: nothing that drives a terminal, hides or shows a key."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterable

# Characters that str.isprintable() lets through and nobody sees: fillers, joiners, variation
# selectors (Default_Ignorable_Code_Point in Unicode's DerivedCoreProperties.txt, as far as
# they are letters or marks), and the empty Braille pattern.
_UNSEEN = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0"
    "\U000e0000-\U000e0fff]"
)
_SHORTEST_SECRET = 4
"""Blotting out a shorter one would hide half of the text and protect nothing."""
_SHORTEST_IN_BASE64 = 8
"""Of a shorter one too little is left that base64 writes always alike."""


def is_plain(text: str) -> bool:
    """Whether all of ``text`` can be seen, and none of it does anything else."""
    return text.isprintable() and (text.isascii() or _UNSEEN.search(text) is None)


def escape(text: str) -> str:
    """``text`` with all that is not plain written out as ``\\x..`` escapes.

    That is what has no character (Unicode's categories Cc, Cf, Cs, Co, Cn, so bidi marks and
    lone surrogates), separates (Zl, Zp, and Zs other than the blank) or cannot be seen. Letters
    of all scripts stay.
    """
    if is_plain(text):
        return text
    return "".join(c if is_plain(c) else c.encode("unicode_escape").decode() for c in text)


def blotter(secrets: Iterable[str], mark: str) -> Callable[[str], str]:
    """A function that puts ``mark`` in place of each of the secrets in a text.

    They are found in the forms in which a text may come back: plain, percent-encoded, escaped
    as in JSON, Python or HTML, each character for itself, and within base64 of a longer text.
    """
    patterns = [_in_any_form(secret) for secret in secrets if len(secret) >= _SHORTEST_SECRET]
    if not patterns:
        return lambda text: text
    pattern = re.compile("|".join(patterns))
    return lambda text: pattern.sub(lambda _: mark, text)


def _in_any_form(secret: str) -> str:
    forms = ["".join(map(_character, secret))]
    if len(secret) >= _SHORTEST_IN_BASE64:
        forms += [_base64(secret.encode(), offset) for offset in range(3)]
    return "|".join(forms)


def _character(char: str) -> str:
    """A pattern of one character as it is, or as an escape."""
    forms = rf"(?i:\\{{1,4}}u{ord(char):04x}|\\{{1,4}}x{ord(char):02x}|&#(?:x0{{0,4}}{ord(char):x}"
    forms += rf"|0{{0,4}}{ord(char)});|{''.join(rf'%(?:25){{0,3}}{b:02x}' for b in char.encode())})"
    named = {"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&apos;"}.get(char)
    forms += f"|{named}" if named else ""
    back = r"\\{0,4}" if not char.isalnum() else ""
    return f"(?:{forms}|{back}{re.escape(char)})"


def _base64(secret: bytes, offset: int) -> str:
    """What base64 makes of a secret that begins at a multiple of three bytes plus ``offset``.

    Its first and last character may depend on the bytes around it, and are left out.
    """
    text = base64.b64encode(bytes(offset) + secret).decode()
    first, last = -(-8 * offset // 6), 8 * (offset + len(secret)) // 6
    forms = {"+": r"[+\-]", "/": r"\\?[/_]"}
    return "".join(forms.get(char, char) for char in text[first:last])
