"""A short run of ``make fuzz``, and proof that its rules can be broken."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz import fragments
from tests.fuzz.__main__ import run_chunk
from tests.fuzz.cases import POLICIES, judge_job, rng_of
from tests.fuzz.invariants import Violation, check_command, check_property, check_text
from tests.fuzz.jobs import make_job
from worker.errors import JobError, Reason
from worker.jobs import parse, places
from worker.jobs.policy import Policy

PLAIN = (
    "/usr/bin/ffmpeg -y -threads 2 -protocol_whitelist file -i file:/media/a.mp4 -c:v libx264 "
    "-protocol_whitelist file -f mp4 file:/work/jobs/j/files/output.mp4"
)
STREAM = (
    "/usr/bin/ffmpeg -protocol_whitelist https,tls -i https://u:p@h:1/x?y -c:v libx264 "
    "-protocol_whitelist rtmp,tcp -fpre /work/jobs/j/stream.options -f flv rtmp://h/live"
)


def test_twenty_thousand_hostile_jobs() -> None:
    chunk = run_chunk(seed=1, first=0, count=20_000)
    assert not chunk.failure
    assert chunk.verdicts.total() == 20_000
    accepted = {name: n for name, n in chunk.verdicts.items() if name.startswith("accepted")}
    assert len(accepted) == 6  # of each kind of input, to a file and to a server
    assert min(accepted.values()) > 20
    assert sum(accepted.values()) > 2_000
    assert len(chunk.verdicts) > 30


def test_a_seed_makes_the_same_jobs_again() -> None:
    # repr, since NaN is not equal to itself
    one, other = ([repr(make_job(rng_of(seed, n))) for n in range(50)] for seed in (7, 7))
    assert one == other
    assert one != [repr(make_job(rng_of(8, n))) for n in range(50)]


def test_what_is_sound() -> None:
    for command in (PLAIN, STREAM):
        check_command(tuple(command.split()), POLICIES[0])


@pytest.mark.parametrize(
    ("command", "old", "new"),
    [
        (PLAIN, "/usr/bin/ffmpeg", "/bin/sh"),
        (PLAIN, "-y", "-report"),
        (PLAIN, "-y", "-filter_complex movie=x"),
        (PLAIN, "-threads 2", "-threads -y"),
        (PLAIN, "-threads 2", "-threads ٢"),
        (PLAIN, "-y", "\x1b"),
        (PLAIN, "libx264", "-y"),
        (PLAIN, "libx264", "libx264,x"),
        (PLAIN, "file:/media/a.mp4", "/media/a.mp4"),
        (PLAIN, "file:/media/a.mp4", "file:/media/../etc/passwd"),
        (PLAIN, "file:/media/a.mp4", "file:/work/jobs/other/files/input.mp4"),
        (PLAIN, "file:/media/a.mp4", "file:/etc/passwd"),
        (PLAIN, "file:/media/a.mp4", "concat:/media/a.mp4"),
        (PLAIN, "file:/media/a.mp4", "-"),
        (PLAIN, "-protocol_whitelist file -i", "-protocol_whitelist file,http -i"),
        (PLAIN, "-protocol_whitelist file -i", "-i"),
        (PLAIN, "-protocol_whitelist file -f", "-f"),
        (PLAIN, "file:/work/jobs/j/files/output.mp4", "file:/work/out.mp4"),
        (PLAIN, "file:/work/jobs/j/files/output.mp4", "/work/jobs/j/files/a file:/work/x"),
        (PLAIN, "file:/work/jobs/j/files/output.mp4", ""),
        (PLAIN, "mp4 file:/work/jobs/j/files/output.mp4", "tee [f=mp4]x"),
        (PLAIN, "-i file:/media/a.mp4", "-f lavfi -i movie=/etc/passwd"),
        (STREAM, "https://u", "gopher://u"),
        (STREAM, "@h:1", "@h\\:1"),
        (STREAM, "https,tls", "https,file"),
        (STREAM, "https,tls", "tls"),
        (STREAM, "rtmp://h/live", "rtmps://h/live"),
        (STREAM, "rtmp://h/live", "tcp://h/live"),
        (STREAM, "-f flv", "-f tee"),
        (STREAM, "/work/jobs/j/stream.options", "/etc/passwd"),
    ],
)
def test_what_is_not(command: str, old: str, new: str) -> None:
    assert old in command
    with pytest.raises(Violation):
        check_command(tuple(command.replace(old, new).split()), POLICIES[0])


def test_texts_and_properties_that_are_not_sound() -> None:
    for text in ("a\nb", "\x1b[31m", "x" * 2001, f"key {fragments.SECRET}"):
        with pytest.raises(Violation):
            check_text(text, "it")
    for value in ("a\nb", [["/bin/x", ["\0"], False]], 2**64):
        with pytest.raises(Violation):
            check_property(value, "it")
    with pytest.raises(Violation):
        check_property([b"A=\x1b"], "LogExtraFields")


def test_a_program_that_lets_everything_through_is_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Policy, "check_input", lambda *_: None)
    assert "Violation: file" in run_chunk(1, 0, 5000).failure
    monkeypatch.undo()
    monkeypatch.setattr(places, "check_query", lambda _: 1 / 0)
    assert "ZeroDivisionError" in run_chunk(1, 0, 5000).failure
    monkeypatch.undo()

    def repeating(value: str, *_: object) -> Path:
        raise JobError(Reason.USER_ERROR, f"cannot read {value}")

    monkeypatch.setattr(parse, "read_input", repeating)
    assert "has a secret in it" in run_chunk(1, 0, 5000).failure


words = st.sampled_from(
    (*fragments.WORDS, *fragments.NUMERALS, *fragments.CHARACTERS, *fragments.OPTIONS)
) | st.sampled_from(fragments.PROTOCOLS)
paths = st.builds(
    "{}/{}".format, st.sampled_from(fragments.FOLDERS), st.sampled_from(fragments.NAMES)
)
urls = st.tuples(
    st.sampled_from(fragments.SCHEMES), st.just("://"), st.sampled_from(["", "u:p@", "@", "a@b@"]),
    *(st.sampled_from(part) for part in (fragments.HOSTS, fragments.PORTS, fragments.PATHS)),
    st.sampled_from(fragments.QUERIES),
).map("".join)  # fmt: skip
mixed = st.lists(words, min_size=2, max_size=3).map("".join)
texts = words | paths | urls | mixed | st.text(max_size=30)
numbers = st.integers() | st.floats() | st.sampled_from(fragments.NUMBERS)
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
parameters = st.dictionaries(
    st.sampled_from(sorted(parse.KNOWN_PARAMETERS)) | st.text(max_size=9), values, max_size=6
)
fields = st.sampled_from(
    ("scenario", "engine", "classification", "resource_limits", "wrapper_constraints", "queue")
) | st.sampled_from(("priority", "status", "created_at", "retry_count", "node_id", "no such"))


@settings(max_examples=500, deadline=None)
@given(texts, parameters | values, st.dictionaries(fields, values, max_size=3), st.integers(0, 99))
def test_any_job_keeps_the_rules(
    job_id: str, wanted: object, more: dict[str, Any], seed: int
) -> None:
    judge_job({**more, "id": job_id, "parameters": wanted}, random.Random(seed))
