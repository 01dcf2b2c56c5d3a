"""Text from elsewhere, made safe to print."""

from __future__ import annotations


def escape(text: str) -> str:
    """``text`` with all that is not printable (control characters, bidi marks, lone surrogates,
    code points without a character) written out as ``\\x..`` escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
