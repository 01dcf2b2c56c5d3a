from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.jobs.scenario import LABEL, Scenario, read_scenario, width_16_9


@pytest.mark.parametrize(
    ("name", "meaning"),
    [
        ("720p30-h264", Scenario(1280, 720, 30, "h264")),
        ("1080P60-H265", Scenario(1920, 1080, 60, "h265")),
        ("480p29.97-vp9", Scenario(854, 480, 29.97, "vp9")),
        ("4K60-h264", Scenario(3840, 2160, 60, "h264")),
        ("4k30-AV1", Scenario(3840, 2160, 30, "av1")),
        ("0p30-h264", Scenario(0, 0, 30, "h264")),
        ("1280x720", Scenario(1280, 720)),
        ("1280X720p60-hevc", Scenario(1280, 720, 60, "hevc")),
        ("640x360@25", Scenario(640, 360, 25)),
        ("640x360-h264-night", Scenario(640, 360, None, "h264")),
        ("640x360 whatever", Scenario(640, 360)),
        ("640x360-mpeg2", Scenario(640, 360)),
    ],
)
def test_names_that_mean_something(name: str, meaning: Scenario) -> None:
    assert read_scenario(name) == meaning


@pytest.mark.parametrize(
    "name",
    [
        "",
        "test",
        "720p30",
        "720p30-h264-extra",
        "my 720p30-h264",
        "4K-h264",
        "720p30-mpeg2",
        "x720",
        "1280x",
        "720p3..0-h264",
        "720p30-h264\n\nx",
        "\u0667\u0662\u0660p30-h264",
        "9" * 20 + "p30-h264",
    ],
)
def test_other_names_are_labels(name: str) -> None:
    assert read_scenario(name) == LABEL


@pytest.mark.parametrize(
    ("height", "width"), [(480, 854), (720, 1280), (1080, 1920), (2160, 3840), (360, 640)]
)
def test_width_is_16_to_9_and_even(height: int, width: int) -> None:
    assert width_16_9(height) == width


@given(st.text())
def test_any_text_can_be_read(name: str) -> None:
    assert isinstance(read_scenario(name), Scenario)
