"""Names: one to one, and valid whatever the id is."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from worker.systemd.names import (
    MAX_LENGTH,
    Step,
    object_path,
    safe_id,
    slice_cgroup,
    slice_name,
    unit_name,
)

# systemd.unit(5): at most 255 characters of these; "@" would make it a template's instance.
UNIT = re.compile(r"[A-Za-z0-9:_.-]{1,247}\.service")

ids = st.one_of(
    st.text(alphabet=st.characters(exclude_categories=())),  # surrogates too
    st.from_regex(r"[A-Za-z0-9_.-]{0,90}", fullmatch=True),
    st.from_regex(
        r"(attached-)?[a-c]{0,2}(-input|-probe|\.service|-h[0-9a-f]{64})?", fullmatch=True
    ),
)


@given(ids)
@example("")
@example("\0")
@example("..")
@example("../../etc/passwd")
@example("a\n[Service]")
@example("%n")
@example("$HOME")
@example("a@b")
@example("\ud800")
@example("x" * 10_000)
@example("ä")
@example("attached")
@example("-attached-1")
def test_every_id_gives_a_valid_name(job_id: str) -> None:
    safe = safe_id(job_id)
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", safe)
    assert len(safe) <= MAX_LENGTH
    assert ".." != safe != "."
    assert not safe.endswith(("-input", "-probe", ".service", ".scope", ".slice", ".mount"))
    assert not safe.startswith("attached-")
    for step in Step:
        assert UNIT.fullmatch(unit_name(job_id, step))


@given(ids, ids)
@example("a/b", "a_b")
@example("a\ud800", "a\ud801")
@example("a", "a\0")
@example("A", "a")
@example("x" * 80, "x" * 81)
def test_two_ids_never_share_a_name(one: str, other: str) -> None:
    names = {unit_name(job_id, step) for job_id in {one, other} for step in Step}
    assert len(names) == len(Step) * len({one, other})


@given(ids)
def test_a_mapped_name_is_not_another_ids_own_name(job_id: str) -> None:
    safe = safe_id(job_id)
    if safe != job_id:
        assert safe_id(safe) != safe


@pytest.mark.parametrize(
    "job_id", ["1", "job-17", "3f2a5c1e-8b7d-4e57-9a55-0a3a1f1c9f00", "a.b_c", "input", "x-h12"]
)
def test_an_ordinary_id_stays(job_id: str) -> None:
    assert safe_id(job_id) == job_id
    assert unit_name(job_id) == f"ffmpeg-job-{job_id}.service"


@pytest.mark.parametrize(
    "job_id",
    ["a-input", "a-probe", "attached-7", "a.service", "a.scope", "a.slice", ".a", "-a", "a b", "",
     "a\n", "x" * 81, "a-h" + "0" * 64],
)  # fmt: skip
def test_a_confusing_id_is_mapped(job_id: str) -> None:
    assert re.search(r"-h[0-9a-f]{64}\Z", safe_id(job_id))


def test_a_mapped_name_can_still_be_recognised() -> None:
    assert safe_id("Käse/Brot").startswith("K_se_Brot-h")


def test_steps() -> None:
    assert unit_name("a", Step.INPUT) == "ffmpeg-job-a-input.service"
    assert unit_name("a", Step.PROBE) == "ffmpeg-job-a-probe.service"


def test_slices() -> None:
    assert slice_name("live") == "ffmpeg-live.slice"
    assert slice_cgroup("ffmpeg-live.slice") == "/ffmpeg.slice/ffmpeg-live.slice"
    assert slice_cgroup("system.slice") == "/system.slice"
    assert slice_cgroup("-.slice") == ""
    with pytest.raises(ValueError, match="'urgent'"):
        slice_name("urgent")


@pytest.mark.parametrize(
    ("unit", "label"),
    [
        ("ffmpeg-job-1.service", "ffmpeg_2djob_2d1_2eservice"),
        ("1a.service", "_31a_2eservice"),
        ("a_b@c:d", "a_5fb_40c_3ad"),
        ("ä", "_c3_a4"),
        ("", "_"),
    ],
)
def test_object_paths(unit: str, label: str) -> None:
    assert object_path(unit) == f"/org/freedesktop/systemd1/unit/{label}"
