"""What is shown of texts by others: nothing that cannot be seen, and no secret."""

from __future__ import annotations

import pytest

from worker.master.answers import quotable
from worker.printable import blotter, escape, is_plain

UNSEEN = [
    "\n", "\r", "\r\n", "\x1b[2J", "\x9b31m", "\x00", "\x7f", "\x85", "\u2028", "\u2029",
    "\u202e", "\u2066", "\u2069", "\u061c", "\u200b", "\u200d", "\u2060", "\ufeff", "\u00ad",
    "\u180e", "\u3164", "\uffa0", "\u115f", "\u034f", "\ufe0f", "\u2800", "\U000e0041",
    "\U000e0100", "\ud800", "\ue000", "\U0010fffd", "\u00a0", "\u3000", "\ufffe",
]  # fmt: skip


@pytest.mark.parametrize("char", UNSEEN)
def test_what_cannot_be_seen_is_written_out(char: str) -> None:
    text = escape(f"a{char}b")
    assert text.startswith("a\\")
    assert text.endswith("b")
    assert is_plain(text)
    assert is_plain(quotable(f"a{char}b"))


@pytest.mark.parametrize(
    "text", ["über", "漢字かな", "русский", "עברית", "العربية", "हिन्दी", "ไทย", "🙂"]
)
def test_letters_of_all_scripts_stay(text: str) -> None:
    assert escape(text) == text
    assert quotable(text) == text


def test_short_secrets_and_none_hide_nothing() -> None:
    assert blotter(["abc", ""], "*")("abcabc") == "abcabc"
    assert blotter(["abcd"], "*")("YWJjZA== abcd") == "YWJjZA== *"
