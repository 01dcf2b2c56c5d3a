from __future__ import annotations

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.errors import (
    JobUnknown,
    MasterRefused,
    MasterUnreachable,
    NodeUnknown,
    Unauthorized,
)
from worker.master.answers import (
    LONGEST_RETRY_AFTER,
    Answer,
    check,
    quotable,
    retry_after,
)

KEY = "s3cret-key"


def answer(status: int, body: str = "", secret: str | None = KEY, **headers: str) -> Answer:
    return Answer(
        peer="box:8080",
        request="GET /jobs/4",
        status=status,
        headers=httpx.Headers({name.replace("_", "-"): value for name, value in headers.items()}),
        location=headers.get("location", ""),
        body=body.encode(),
        secret=secret,
    )


@pytest.mark.parametrize("status", [200, 201, 204])
def test_success_raises_nothing(status: int) -> None:
    check(answer(status))


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key(status: int) -> None:
    with pytest.raises(Unauthorized, match=r"box:8080.*Invalid API key.*check MASTER_API_KEY"):
        check(answer(status, "Invalid API key\n"))
    with pytest.raises(Unauthorized, match="MASTER_API_KEY is not set"):
        check(answer(status, "Missing Authorization header\n", secret=None))


@pytest.mark.parametrize(
    "body",
    [
        "Job not found\n",
        "job 4aa1a226 not found",
        "No such job",
        '{"error": "Job not found"}',
        '{"detail": "The job was not found."}',
        '{"code": "job_not_found", "message": "?"}',
    ],
)
def test_an_unknown_job(body: str) -> None:
    with pytest.raises(JobUnknown):
        check(answer(404, body))


@pytest.mark.parametrize("body", ["Node not found\n", '{"message": "unknown node"}'])
def test_an_unknown_node(body: str) -> None:
    with pytest.raises(NodeUnknown):
        check(answer(404, body))


@pytest.mark.parametrize(
    "body",
    [
        "404 page not found\n",
        "",
        "Cannot GET /jobs/4",
        "/jobs/4 not found",
        "<html>job not found</html>",
        '{"detail": "Not Found"}',
        '{"error": "Not Found", "path": "/jobs/4"}',
        '["job not found"]',
        '{"error": {"job": "not found"}}',
        "[" * 4096,
    ],
)
def test_an_unknown_route_says_nothing_about_the_job(body: str) -> None:
    with pytest.raises(MasterRefused, match="is MASTER_URL right") as caught:
        check(answer(404, body))
    assert type(caught.value) is MasterRefused
    assert caught.value.status == 404


def test_plain_http_on_a_tls_port_never_reached_the_master() -> None:
    with pytest.raises(MasterUnreachable, match="https://") as caught:
        check(answer(400, "Client sent an HTTP request to an HTTPS server.\n"))
    assert not caught.value.sent


def test_a_redirect_is_named() -> None:
    with pytest.raises(MasterRefused, match=r"redirects to 'https://else\.where/'.*MASTER_URL"):
        check(answer(301, location="https://else.where/"))


def test_retry_after_goes_along() -> None:
    with pytest.raises(MasterRefused) as caught:
        check(answer(503, "busy", retry_after="7"))
    assert (caught.value.status, caught.value.body, caught.value.retry_after) == (503, "busy", 7.0)
    with pytest.raises(Unauthorized) as refused:
        check(answer(403, "later", retry_after="120"))
    assert refused.value.retry_after == 120.0


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", 0.0),
        (" 120 ", 120.0),
        ("9" * 500, LONGEST_RETRY_AFTER),
        ("Tue, 24 Nov 2026 21:01:30 GMT", 90.0),
        ("Tuesday, 24-Nov-26 21:01:30 GMT", 90.0),
        ("Tue, 24 Nov 2026 20:00:00 GMT", 0.0),
        ("Tue, 24 Nov 2099 20:00:00 GMT", LONGEST_RETRY_AFTER),
        ("-1", None),
        ("1.5", None),
        ("soon", None),
        ("", None),
        ("\u0663", None),
    ],
)
def test_retry_after(value: str, seconds: float | None) -> None:
    headers = httpx.Headers({"Date": "Tue, 24 Nov 2026 21:00:00 GMT"})
    headers["Retry-After"] = value
    assert retry_after(headers) == seconds


def test_a_date_without_a_date_to_compare_is_compared_with_our_clock() -> None:
    past = httpx.Headers({"Retry-After": "Tue, 24 Nov 1998 20:00:00 GMT", "Date": "gibberish"})
    assert retry_after(past) == 0.0
    assert retry_after(httpx.Headers()) is None


@pytest.mark.parametrize("body", ["", "<html>", "{", "NaN", "[" * 40_000, "1" * 5000])
def test_no_json_is_refused_with_a_short_excerpt(body: str) -> None:
    with pytest.raises(MasterRefused, match=r"no JSON|nested too deeply") as caught:
        answer(200, body).json()
    assert len(str(caught.value)) < 400
    assert caught.value.status == 200


def test_the_key_is_never_quoted() -> None:
    with pytest.raises(MasterRefused) as caught:
        check(answer(500, f"bad header: Bearer {KEY}", location=KEY))
    assert KEY not in str(caught.value) + caught.value.body
    with pytest.raises(MasterRefused) as caught:
        check(answer(302, location=f"/?key={KEY}"))
    assert KEY not in str(caught.value)


@given(st.text())
def test_quotable_is_one_short_printable_line(text: str) -> None:
    quoted = quotable(text)
    assert len(quoted) <= 200
    assert quoted.isprintable()
