from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.errors import JobError, Reason
from worker.jobs.outcome import COMPLETED, Outcome, error_text
from worker.jobs.text import label, plain, redact, shown, without_requeue_words

REQUEUE = (
    "connection refused",
    "timeout",
    "temporary failure",
    "network error",
    "no such host",
    "broken pipe",
    "connection reset",
    "node unavailable",
    "worker died",
    "stale",
)


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("rtmp://host/live/secret", "rtmp://host/live/***"),
        ("rtmp://host/live/secret: Connection refused", "rtmp://host/live/***: Connection refused"),
        ("rtmps://host:1935/a/b/secret/", "rtmps://host:1935/a/***"),
        ("rtmp://host/app", "rtmp://host/app"),
        ("http://user:pass@host/x.mp4", "http://***@host/x.mp4"),
        ("http://user:pa/ss@host/x.mp4", "http://***@host/"),
        ("rtmp://u:pa'ss@host/live/k'ey", "rtmp://***@host/live/***"),
        ("srt://host:1?passphrase=x&b=c", "srt://host:1?***"),
        ("https://host/a?token=1#frag", "https://host/a?***#***"),
        ("'http://host/x?key=1', no", "'http://host/x?***', no"),
        ("file:/tmp/a.mp4: No such file", "file:/tmp/a.mp4: No such file"),
        ("http://[bad", "http://***"),
        ("http://user:pa#ss@host/x", "http://***#***"),
        (
            "\u017fhttp://u:p@h/x 1http://u:p@h, _rtmp://h/a/k",
            "\u017fhttp://***@h/x 1http://***@h, _rtmp://h/a/***",
        ),
        ("2rtmp://h/a/k", "2rtmp://h/a/***"),
        ("rtmp://h/a/b/c://d/key", "rtmp://h/a/***"),
        ("rtmp://h/a/mp4:b/key", "rtmp://h/a/***"),
        ("'http://h:'", "'http://h:'"),
        ("http://user:pa?ss@host/x", "http://***?***"),
        ("http://user:passhost/x", "http://***/x"),
        ("http://[::1]:80/x http://h:1", "http://[::1]:80/x http://h:1"),
    ],
)
def test_secrets_of_urls_are_cut_out(text: str, safe: str) -> None:
    assert redact(text) == safe


def test_terminal_escapes_and_control_characters_do_not_survive() -> None:
    assert plain("\x1b[31mred\x1b[0m \x1b]0;title\x07end\x00\u202e") == "red end\\x00\\u202e"
    assert label("a\nb\ud800") == "a\\nb\\ud800"


def test_long_texts_are_shortened() -> None:
    assert len(plain("x" * 10_000)) == 300
    assert len(label("\x00" * 10_000)) == 200


def test_any_value_can_be_shown() -> None:
    odd = [10**5000, -(10**5000), "x" * 9999, ["y"] * 99, {"a": 1}, None, True, float("nan"), b""]
    for value in odd:
        assert 0 < len(shown(value)) < 70


@given(st.text(max_size=50), st.sampled_from(REQUEUE), st.booleans())
def test_no_requeue_word_survives(noise: str, word: str, upper: bool) -> None:
    text = without_requeue_words(noise + (word.upper() if upper else word) + noise)
    assert not any(bad in text.lower() for bad in REQUEUE)


def test_requeue_words_stay_legible() -> None:
    assert without_requeue_words("resource_limits.timeout_sec") == "resource_limits.time-out_sec"
    assert without_requeue_words("Stale: Connection refused") == "Sta-le: Connection-refused"


@pytest.mark.parametrize("reason", Reason)
def test_error_text_opens_with_the_reason(reason: Reason) -> None:
    text = error_text(Outcome.of(JobError(reason, "a broken pipe at rtmp://h/live/key")))
    assert text is not None
    assert text.startswith(f"{reason.value}: ")
    assert "key" not in text
    again = reason in (Reason.NETWORK_ERROR, Reason.TIMEOUT, Reason.PLATFORM_ERROR)
    assert ("broken pipe" in text) is again


def test_error_text_of_a_completed_job_is_none() -> None:
    assert error_text(COMPLETED) is None


LONG = ("a." * 500_000, "x" * 10**6, "http://" + ":" * 10**6 + "x", "http://@" * 10**5)


@pytest.mark.parametrize(
    "text", [*LONG, "\x1b]" * 10**5, " " * 10**6 + "x", "rtmp://" + "a/" * 10**6]
)
def test_no_text_takes_long(text: str) -> None:
    begun = time.process_time()
    for treat in (redact, plain, shown, without_requeue_words):
        treat(text)
    assert time.process_time() - begun < 1


@pytest.mark.parametrize(
    "value",
    [
        *("http://me:hunter2 x@h/", "http:/me:hunter2@h/", "http:me:hunter2@h", "x:?a=hunter2"),
        *("rtmp://h/live/hunter2 x", "srt://h:1 ?passphrase=hunter2", "http://me:\x00hunter2@h/"),
        *("/://h/x?passphrase=hunter2", "/../rtmp://h/a b?passphrase=hunter2"),
        *("/x http://h/ http://me:hunter2@h"),
    ],
)
def test_a_url_in_an_error_keeps_its_secret_even_if_it_is_none(value: str) -> None:
    assert "hunter2" not in shown(value)
