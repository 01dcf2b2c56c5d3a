"""Which encoders work here: those that ffmpeg lists and that encode a frame when tried.

Being compiled in says little: h264_nvenc is in every distribution's ffmpeg and needs a GPU with
its driver. So each candidate encodes one small frame, in a process with a time limit.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shutil
import signal
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from worker.node.cpu import usable_cpus
from worker.node.gpu import Gpu

logger = logging.getLogger(__name__)

SOFTWARE = ("libx264", "libx265", "libvpx-vp9", "libsvtav1", "libaom-av1", "librav1e")
_HARDWARE: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "nvidia": ("h264_nvenc", "hevc_nvenc", "av1_nvenc"),
        "intel": (
            *("h264_qsv", "hevc_qsv", "vp9_qsv", "av1_qsv"),
            *("h264_vaapi", "hevc_vaapi", "vp9_vaapi", "av1_vaapi"),
        ),
        "amd": ("h264_vaapi", "hevc_vaapi", "av1_vaapi"),
    }
)
_HARDWARE_NAME = re.compile(
    r".*_(nvenc|qsv|vaapi|amf|v4l2m2m|omx|mf|mediacodec|videotoolbox|vulkan|d3d12va|rkmpp|mmal)"
)
_VIDEO_ENCODER = re.compile(r" V[.A-Z]{5} ([0-9A-Za-z_.-]+)(?: |$)")
_TRIAL_SEC = 15.0
"""The first use of a GPU after boot can take several seconds."""
_LISTING_SEC = 60.0
"""Longer: without the listing no job can run, and a busy machine takes its time to load ffmpeg."""
_ENVIRONMENT = ("PATH", "HOME", "LD_LIBRARY_PATH")


@dataclass(frozen=True, slots=True)
class Encoders:
    listed: frozenset[str] = frozenset()
    """Every video encoder that the build has."""
    hwaccels: frozenset[str] = frozenset()
    """Ways to decode in hardware that the build has; not tried."""
    proven: frozenset[str] = frozenset()
    """Those that encoded a frame."""
    failed: frozenset[str] = frozenset()
    """Those that were tried and did not."""
    unknown: frozenset[str] = frozenset()
    """Those whose trial took too long to say anything."""

    @property
    def hardware(self) -> frozenset[str]:
        """The proven ones that need hardware."""
        return frozenset(filter(needs_hardware, self.proven))

    @property
    def usable(self) -> frozenset[str]:
        """What a job may ask for: proven, or of software, listed and never seen to fail."""
        software = {name for name in self.listed if not needs_hardware(name)}
        return self.proven | (software - self.failed)


def encoders_of(gpu: Gpu) -> tuple[str, ...]:
    """Those that GPUs of this vendor may have."""
    return _HARDWARE[gpu.vendor]


def needs_hardware(encoder: str) -> bool:
    return _HARDWARE_NAME.fullmatch(encoder) is not None


def parse_encoders(text: str) -> frozenset[str]:
    """The video encoders in the output of ``ffmpeg -encoders``."""
    return frozenset(
        match[1] for line in text.splitlines() if (match := _VIDEO_ENCODER.match(line))
    )


def parse_hwaccels(text: str) -> frozenset[str]:
    """The names in the output of ``ffmpeg -hwaccels``, without its heading."""
    return frozenset(
        line.strip() for line in text.splitlines() if re.fullmatch(r"[a-z0-9_]+", line.strip())
    )


def candidates(listed: Iterable[str], gpus: Iterable[Gpu]) -> list[tuple[str, str | None]]:
    """What to try: encoders, those of hardware with the render node of their GPU."""
    listed = set(listed)
    found: dict[str, str | None] = {name: None for name in SOFTWARE if name in listed}
    for gpu in gpus:
        for name in encoders_of(gpu):
            if name in listed and (gpu.render_node or name.endswith("_nvenc")):
                found.setdefault(name, gpu.render_node)
    return list(found.items())


def trial_command(ffmpeg: str, encoder: str, render_node: str | None) -> list[str]:
    """Encode one frame to nowhere; ``-progress`` says whether a frame came out."""
    before: list[str] = []
    filters: list[str] = []
    if encoder.endswith("_vaapi"):
        before = ["-vaapi_device", render_node or ""]
        filters = ["-vf", "format=nv12,hwupload"]
    elif encoder.endswith("_qsv"):
        before = ["-init_hw_device", f"qsv=hw,child_device={render_node}"]
        filters = ["-vf", "format=nv12"]
    # 320x240: some hardware refuses less
    source = ["-f", "lavfi", "-i", "color=c=black:s=320x240:r=25"]
    return [
        *(ffmpeg, "-hide_banner", "-nostdin", "-nostats", "-loglevel", "error"),
        *("-progress", "pipe:1"),
        *before,
        *source,
        *filters,
        *("-frames:v", "1", "-c:v", encoder, "-f", "null", "-"),
    ]


async def probe(gpus: Sequence[Gpu] = (), *, ffmpeg: str = "ffmpeg") -> Encoders:
    """Ask ffmpeg what it has, and try what matters; nothing where there is no ffmpeg."""
    path = shutil.which(ffmpeg)
    if path is None:
        logger.warning("%s is not installed (or not in PATH): no job can run here", ffmpeg)
        return Encoders()
    encoders, hwaccels = await asyncio.gather(
        _listing(path, "-encoders"), _listing(path, "-hwaccels")
    )
    if encoders is None:
        logger.warning("%s -encoders does not work: no job can run here", path)
        return Encoders()
    listed = parse_encoders(encoders)
    at_once = asyncio.Semaphore(usable_cpus())

    async def works(encoder: str, render_node: str | None) -> bool | None:
        """None: it took too long to tell."""
        try:
            async with at_once:
                output = await _run(trial_command(path, encoder, render_node), _TRIAL_SEC)
        except TimeoutError:
            return None
        return output is not None and re.search(r"^frame=1$", output, re.MULTILINE) is not None

    tried = candidates(listed, gpus)
    results = await asyncio.gather(*(works(*candidate) for candidate in tried))
    outcome = dict(zip((name for name, _ in tried), results, strict=True))
    found = Encoders(
        listed=listed,
        hwaccels=parse_hwaccels(hwaccels or ""),
        proven=frozenset(name for name, good in outcome.items() if good),
        failed=frozenset(name for name, good in outcome.items() if good is False),
        unknown=frozenset(name for name, good in outcome.items() if good is None),
    )
    logger.info("encoders that work: %s", ", ".join(sorted(found.proven)) or "none")
    if found.failed:
        logger.info("encoders that do not work here: %s", ", ".join(sorted(found.failed)))
    if found.unknown:
        logger.warning(
            "encoders whose trial took longer than %g s: %s; those of software may be used all the"
            " same, those of hardware not before the worker is started again",
            _TRIAL_SEC, ", ".join(sorted(found.unknown)),
        )  # fmt: skip
    return found


async def _listing(ffmpeg: str, what: str) -> str | None:
    """The output of ``ffmpeg -encoders`` and the like; None where two attempts came to nothing."""
    for _ in range(2):
        try:
            output = await _run([ffmpeg, "-hide_banner", what], _LISTING_SEC)
        except TimeoutError:
            logger.warning("%s %s did not end within %g s", ffmpeg, what, _LISTING_SEC)
            continue
        if output is not None:
            return output
    return None


async def _run(argv: Sequence[str], limit: float) -> str | None:
    """Standard output, or None where the process failed.

    Raises TimeoutError after ``limit`` seconds, when it has been killed.
    """
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    try:
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=environment | {"LC_ALL": "C"},
            start_new_session=True,
        )
    except OSError as error:
        logger.debug("%s cannot be run: %s", argv[0], error)
        return None
    try:
        async with asyncio.timeout(limit):
            stdout, stderr = await process.communicate()
    except TimeoutError:
        logger.debug("gave up after %g s: %s", limit, " ".join(argv))
        raise
    finally:
        if process.returncode is None:
            # the whole group: a wrapper script may have started the real ffmpeg
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                logger.debug("process %d had just ended", process.pid)
            await process.wait()
    if process.returncode != 0:
        last = stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
        logger.debug("exit status %s, %r: %s", process.returncode, last, " ".join(argv))
        return None
    return stdout.decode("utf-8", "replace")
