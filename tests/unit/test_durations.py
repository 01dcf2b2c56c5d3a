from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.config.durations import format_duration, parse_duration


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("3s", 3),
        ("1m30s", 90),
        ("1.5h", 5400),
        ("500ms", 0.5),
        ("0", 0),
        ("-0", 0),
        ("+5s", 5),
        ("-2s", -2),
        ("1.s", 1),
        (".5s", 0.5),
        ("1s1s", 2),
        ("30s2h", 7230),
        ("100us", 0.0001),
        ("100µs", 0.0001),
        ("100μs", 0.0001),
        ("7ns", 7e-9),
    ],
)
def test_durations_as_go_takes_them(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "s",
        ".s",
        "3 s",
        " 3s",
        "3s ",
        "3S",
        "3d",
        "3sec",
        "1,5s",
        "-",
        "+-3s",
        "1e3s",
        "3s4",
        "٣s",
        "9999999999h",
        "3s\n",
        "nan",
        "infs",
    ],
)
def test_what_go_refuses_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be a duration such as"):
        parse_duration(text)


@pytest.mark.parametrize("text", ["3", "1.5", "-3", "30"])
def test_a_bare_number_is_told_that_it_lacks_a_unit(text: str) -> None:
    with pytest.raises(ValueError, match=f"has no unit: write {text}s"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(3.0, "3s"), (90.0, "1m30s"), (3600.0, "1h"), (0.5, "500ms"), (0.0, "0s"), (-2.0, "-2s")],
)
def test_format(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@given(st.integers(min_value=0, max_value=10**8))
def test_what_is_formatted_is_parsed_back(milliseconds: int) -> None:
    seconds = milliseconds / 1000
    assert parse_duration(format_duration(seconds)) == pytest.approx(seconds, abs=1e-6)
