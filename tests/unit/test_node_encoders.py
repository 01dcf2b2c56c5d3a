from __future__ import annotations

import time
from pathlib import Path

import pytest

from worker.node import encoders as encoders_module
from worker.node.encoders import (
    Encoders,
    candidates,
    needs_hardware,
    parse_encoders,
    parse_hwaccels,
    probe,
    trial_command,
)
from worker.node.gpu import Gpu

LISTING = """\
Encoders:
 V..... = Video
 A..... = Audio
 .....D = Supports direct rendering method 1
 ------
 V....D libx264              libx264 H.264 / AVC (codec h264)
 V....D libx264rgb           libx264 H.264 / AVC RGB (codec h264)
 V..... libsvtav1            SVT-AV1 encoder (codec av1)
 VFS..D ffv1                 FFmpeg video codec #1
 V....D h264_nvenc           NVIDIA NVENC H.264 encoder (codec h264)
 V....D h264_vaapi           H.264/AVC (VAAPI) (codec h264)
 V..... h264_qsv             H.264 (Intel Quick Sync Video) (codec h264)
 A....D aac                  AAC (Advanced Audio Coding)
 S..... ass                  ASS subtitle
"""
LISTED = {"libx264", "libx264rgb", "libsvtav1", "ffv1", "h264_nvenc", "h264_vaapi", "h264_qsv"}
NVIDIA = Gpu("nvidia", "NVIDIA T4", "0000:03:00.0", None)
INTEL = Gpu("intel", "Intel", "0000:00:02.0", "/dev/dri/renderD128")
AMD = Gpu("amd", "AMD", "0000:04:00.0", "/dev/dri/renderD129")


def test_listing() -> None:
    assert parse_encoders(LISTING) == LISTED
    assert parse_encoders("") == frozenset()


def test_hwaccels() -> None:
    text = "Hardware acceleration methods:\nvdpau\ncuda\nd3d11va\n\n"
    assert parse_hwaccels(text) == {"vdpau", "cuda", "d3d11va"}


@pytest.mark.parametrize("name", ["h264_nvenc", "av1_qsv", "vp9_vaapi", "h264_v4l2m2m", "h264_omx"])
def test_hardware_encoders(name: str) -> None:
    assert needs_hardware(name)


@pytest.mark.parametrize("name", ["libx264", "libvpx-vp9", "libsvtav1", "mpeg4", "prores_ks"])
def test_software_encoders(name: str) -> None:
    assert not needs_hardware(name)


def test_only_what_is_listed_and_has_its_gpu_is_tried() -> None:
    assert candidates(LISTED, []) == [("libx264", None), ("libsvtav1", None)]
    assert candidates(LISTED, [NVIDIA])[2:] == [("h264_nvenc", None)]
    assert candidates(LISTED, [INTEL])[2:] == [
        ("h264_qsv", "/dev/dri/renderD128"),
        ("h264_vaapi", "/dev/dri/renderD128"),
    ]
    assert candidates(LISTED, [AMD])[2:] == [("h264_vaapi", "/dev/dri/renderD129")]
    # one try for two GPUs that share an encoder, on the first
    assert candidates(LISTED, [INTEL, AMD])[2:] == candidates(LISTED, [INTEL])[2:]


def test_no_vaapi_without_a_render_node() -> None:
    assert candidates(["h264_vaapi"], [Gpu("amd", "AMD", "0000:04:00.0", None)]) == []


def test_trial_commands() -> None:
    vaapi = " ".join(trial_command("/usr/bin/ffmpeg", "h264_vaapi", "/dev/dri/renderD129"))
    assert "-vaapi_device /dev/dri/renderD129 " in vaapi
    assert "-vf format=nv12,hwupload " in vaapi
    qsv = " ".join(trial_command("/usr/bin/ffmpeg", "h264_qsv", "/dev/dri/renderD128"))
    assert "-init_hw_device qsv=hw,child_device=/dev/dri/renderD128 " in qsv
    plain = " ".join(trial_command("/usr/bin/ffmpeg", "libx264", None))
    assert plain.endswith("-frames:v 1 -c:v libx264 -f null -")
    assert "-vf" not in plain


def test_usable_is_what_works_or_is_software_and_was_not_seen_to_fail() -> None:
    found = Encoders(
        listed=frozenset(LISTED),
        proven=frozenset({"libx264", "h264_nvenc"}),
        failed=frozenset({"libsvtav1"}),
        unknown=frozenset({"ffv1", "h264_qsv"}),
    )
    assert found.usable == {"libx264", "libx264rgb", "ffv1", "h264_nvenc"}
    assert found.hardware == {"h264_nvenc"}


# with a stand-in for ffmpeg


def script(tmp_path: Path, trial: str) -> str:
    """A program that lists as above and does ``trial`` when asked to encode."""
    listing = tmp_path / "listing"
    listing.write_text(LISTING, encoding="utf-8")
    path = tmp_path / "ffmpeg"
    path.write_text(
        "#!/bin/sh\n"
        f'case "$*" in *-encoders) exec cat "{listing}";;\n'
        "*-hwaccels) echo Methods:; echo cuda; exit;; esac\n" + trial,
        encoding="utf-8",
    )
    path.chmod(0o755)
    return str(path)


async def test_an_encoder_counts_if_a_frame_came_out(tmp_path: Path) -> None:
    trial = """
case "$*" in
*libx264*) echo frame=1; echo progress=end;;
*libsvtav1*) echo frame=0; echo progress=end;;
*) echo "no such device" >&2; exit 1;;
esac
"""
    found = await probe([NVIDIA], ffmpeg=script(tmp_path, trial))
    assert found.proven == {"libx264"}
    assert found.failed == {"libsvtav1", "h264_nvenc"}
    assert found.hwaccels == {"cuda"}
    assert found.listed == LISTED


async def test_the_key_is_not_in_the_environment_of_what_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASTER_API_KEY", "sesame")
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/x")
    trial = '[ -z "$MASTER_API_KEY$NOTIFY_SOCKET" ] && echo frame=1\n'
    found = await probe(ffmpeg=script(tmp_path, trial))
    assert found.proven == {"libx264", "libsvtav1"}


async def test_an_encoder_that_hangs_is_given_up_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoders_module, "_TRIAL_SEC", 0.5)
    start = time.monotonic()
    found = await probe(ffmpeg=script(tmp_path, f"sleep 60 & echo $! >> {tmp_path}/pids; wait\n"))
    assert found.proven == frozenset()
    assert found.unknown == {"libx264", "libsvtav1"}
    assert time.monotonic() - start < 10
    for pid in (tmp_path / "pids").read_text().split():
        stat = Path("/proc", pid, "stat")
        assert not stat.exists() or stat.read_text().split()[2] == "Z"


async def test_what_took_too_long_is_usable_if_it_is_software_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(encoders_module, "_TRIAL_SEC", 3.0)
    trial = 'case "$*" in *libsvtav1*) exit 1;; esac; exec sleep 60\n'
    found = await probe([NVIDIA], ffmpeg=script(tmp_path, trial))
    assert found.unknown == {"libx264", "h264_nvenc"}
    assert found.failed == {"libsvtav1"}
    assert found.proven == frozenset()
    assert found.usable == {"libx264", "libx264rgb", "ffv1"}
    assert "took longer than 3 s: h264_nvenc, libx264;" in caplog.text


async def test_a_listing_that_hangs_once_is_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(encoders_module, "_LISTING_SEC", 3.0)
    path = Path(script(tmp_path, "echo frame=1\n"))
    hang = f'if [ $# = 2 ] && mkdir "{tmp_path}/$2" 2>/dev/null; then exec sleep 60; fi'
    path.write_text(path.read_text().replace("\n", f"\n{hang}\n", 1))
    found = await probe(ffmpeg=str(path))
    assert found.listed == LISTED
    assert found.hwaccels == {"cuda"}
    assert found.proven == {"libx264", "libsvtav1"}
    assert "-encoders did not end within 3 s" in caplog.text


async def test_a_listing_that_always_hangs_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(encoders_module, "_LISTING_SEC", 0.2)
    path = tmp_path / "ffmpeg"
    path.write_text("#!/bin/sh\nexec sleep 60\n", encoding="utf-8")
    path.chmod(0o755)
    assert await probe(ffmpeg=str(path)) == Encoders()
    assert caplog.text.count("-encoders did not end within 0.2 s") == 2
    assert "no job can run here" in caplog.text


async def test_without_ffmpeg_there_is_nothing_and_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert await probe(ffmpeg=str(tmp_path / "ffmpeg")) == Encoders()
    assert "is not installed" in caplog.text


async def test_a_broken_ffmpeg_is_nothing_and_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "ffmpeg"
    path.write_text("no program", encoding="utf-8")
    path.chmod(0o755)
    assert await probe(ffmpeg=str(path)) == Encoders()
    assert "does not work" in caplog.text
