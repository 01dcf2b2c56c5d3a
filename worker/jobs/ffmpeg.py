"""The command lines: what is asked of ffmpeg and ffprobe. No shell is ever involved."""

from __future__ import annotations

from pathlib import Path

from worker.jobs import rtmp
from worker.jobs.containers import audio_options
from worker.jobs.encoders import codec_of, preset_options
from worker.jobs.spec import FileInput, GeneratedInput, JobSpec, StreamOutput, UrlInput
from worker.jobs.text import redact, url_scheme

_MAX_DECODER_THREADS = 16  # ffmpeg advises against more, and each counts against the task limit
_GLOBAL = (
    "-hide_banner",
    "-nostdin",
    "-nostats",
    "-benchmark",  # CPU time and peak memory in the log, exact even for the shortest job
    *("-progress", "pipe:1"),
    "-y",
)
_EVEN_ONLY = frozenset({"h264", "hevc", "av1"})  # their encoders refuse an odd size, or some do
_INPUT_ENCODERS = ("libx264", "libopenh264", "mpeg4")
_INPUT_BITS_PER_PIXEL = 0.1  # 4K at 60 frames/s: 50 Mbit/s; unbounded noise would be ten times that
_KEYFRAME_SEC = 2  # a viewer can join at a keyframe only
_FILE_ONLY = ("-protocol_whitelist", "file")
_CARRIERS = {
    "http": ("tcp", "crypto", "data"),
    "https": ("tls", "tcp", "crypto", "data"),
    "rtmp": ("tcp",),
    "rtmps": ("tls", "tcp"),
    "rtsp": ("rtp", "srtp", "udp", "tcp"),
    "srt": (),
    "udp": (),
    "tcp": (),
    "rtp": ("srtp", "udp"),
}
"""What ffmpeg must be able to open for a scheme besides it: never a local file, so that no
playlist from afar can read one, and no proxy."""
SERVER_TIMEOUT_SEC = 10
"""For each answer of a streaming server, and for each write that it holds up."""
_PROBE_ENTRIES = (
    "format=format_name,duration,size,bit_rate"
    ":stream=codec_type,codec_name,width,height,avg_frame_rate,r_frame_rate,nb_frames,duration"
    ":stream_tags=DURATION"
    ":frame=media_type"
)


def input_encoder(encoders: frozenset[str]) -> str:
    """What a generated input is encoded with: the first that the build has and mp4 can hold."""
    return next((name for name in _INPUT_ENCODERS if name in encoders), "mpeg4")


def input_command(
    spec: JobSpec,
    ffmpeg: Path | str,
    destination: Path,
    *,
    encoders: frozenset[str] = frozenset({"libx264"}),
    threads: int | None = None,
) -> tuple[str, ...]:
    """Make the test video that ``spec.source`` (a GeneratedInput) describes, as mp4."""
    source = spec.source
    if not isinstance(source, GeneratedInput):
        raise ValueError(f"the input of job {spec.id} is given, not generated")
    encoder = input_encoder(encoders)
    rate = _decimal(source.frame_rate)
    graph = (
        f"testsrc2=size={source.width}x{source.height}:rate={rate}"
        f":duration={_decimal(source.duration_sec)},noise=alls=10:allf=t+u"
    )
    pixels = source.width * source.height * source.frame_rate
    return (
        str(ffmpeg),
        *_GLOBAL,
        *("-loglevel", "level+info"),
        *("-f", "lavfi", "-i", graph),
        *("-c:v", encoder),
        *("-b:v", str(max(100_000, round(pixels * _INPUT_BITS_PER_PIXEL)))),
        *(("-preset", "ultrafast") if encoder == "libx264" else ()),
        *("-threads", str(threads or spec.threads)),
        *("-pix_fmt", "yuv420p"),
        *_FILE_ONLY,
        *("-f", "mp4", _file(destination)),
    )


def transcode_command(
    spec: JobSpec, ffmpeg: Path | str, source: Path | str, output: Path
) -> tuple[str, ...]:
    """Transcode ``source`` (a path, or the URL of a UrlInput) into ``output``.

    Streams are those that ffmpeg selects by itself: the largest video and the best audio, which
    is what a client means by "the input" where a file holds several. Subtitles and data are left
    out: whether they fit depends on the container, and one that does not would fail the job.
    """
    return (
        str(ffmpeg),
        *_GLOBAL,
        *("-loglevel", "level+quiet" if _has_secret(spec) else "level+info"),
        *_hardware(spec),
        *_input(spec, source),
        *_encoding(spec, spec.duration_sec),
        *_FILE_ONLY,
        *("-f", spec.muxer, _file(output)),
    )


def stream_secrets(spec: JobSpec) -> str:
    """What is to stand in the file ``secrets`` of ``stream_command``; empty: none is needed."""
    return _stream(spec).presets


def stream_command(
    spec: JobSpec, ffmpeg: Path | str, source: Path | str, *, secrets: Path | None
) -> tuple[str, ...]:
    """Send ``source`` (see ``transcode_command``) to a server, at the speed of life.

    A test video is made on the way, with a tone, and ``source`` is of no account. ``secrets`` is
    a file with ``stream_secrets(spec)`` in it, which only the job can read; None where that is
    empty.
    """
    if not isinstance(spec.output, StreamOutput):
        raise ValueError(f"the output of job {spec.id} is a file")
    url, made, duration = spec.output.url, spec.source, spec.duration_sec
    hidden: tuple[str, ...] = ()
    if stream_secrets(spec):
        if secrets is None:
            raise ValueError(f"the stream of job {spec.id} needs a file for what is secret in it")
        url, hidden = _stream(spec).place, ("-fpre", _absolute(secrets))
    if isinstance(made, GeneratedInput):
        rate = _decimal(made.frame_rate)
        reading: tuple[str, ...] = (
            *("-re", "-f", "lavfi", "-i", f"testsrc2=size={made.width}x{made.height}:rate={rate}"),
            *("-re", "-f", "lavfi", "-i", "sine=frequency=1000:sample_rate=44100"),
        )
        duration = made.duration_sec if duration is None else duration
    else:
        # What comes over a network comes at its own speed.
        pace = () if isinstance(made, UrlInput) else ("-re",)
        reading = (*pace, *_input(spec, source))
    return (
        str(ffmpeg),
        *_GLOBAL,
        *("-loglevel", "level+quiet" if _has_secret(spec) else "level+info"),
        *_hardware(spec),
        *reading,
        *_encoding(spec, duration),
        *(("-pix_fmt", "yuv420p") if not spec.encoder.endswith("_vaapi") else ()),
        *_keyframes(spec),
        # There is no header to go back to when the length is known.
        *("-flvflags", "no_duration_filesize"),
        *("-protocol_whitelist", _protocols(url_scheme(url))),
        *("-rw_timeout", str(SERVER_TIMEOUT_SEC * 1_000_000)),
        *hidden,
        *("-f", spec.muxer, url),
    )


def probe_command(ffprobe: Path | str, path: Path) -> tuple[str, ...]:
    """Container, video stream and one decoded frame of ``path``, as JSON.

    Reads one packet, so it is quick however long the file. The frame shows that the stream can
    be decoded; a header alone would not.
    """
    return (
        str(ffprobe),
        "-hide_banner",
        *("-loglevel", "level+error"),
        *_FILE_ONLY,
        *("-select_streams", "v:0"),
        *("-read_intervals", "%+#1"),
        *("-show_entries", _PROBE_ENTRIES),
        *("-of", "json"),
        *("-i", _file(path)),
    )


def report_environment(log: Path) -> dict[str, str]:
    """The environment that makes ffmpeg write its log, at level verbose, to ``log``.

    What it read and wrote is said at that level only.

    FFREPORT is a list of key=value, where ``:`` ends a value, a backslash or a quote protects,
    and in the file name ``%`` starts a placeholder (ffmpeg(1), -report).
    """
    name = str(log).replace("%", "%%")
    for special in ("\\", ":", "'", " "):
        name = name.replace(special, "\\" + special)
    return {"FFREPORT": f"file={name}:level=40"}


def _encoding(spec: JobSpec, duration: float | None) -> tuple[str, ...]:
    return (
        *(("-t", _decimal(duration)) if duration is not None else ()),
        *("-sn", "-dn"),
        *("-c:v", spec.encoder),
        *("-b:v", str(spec.bitrate_bps)),
        *preset_options(spec.encoder, spec.preset),
        *(("-tune", spec.tune) if spec.tune is not None else ()),
        *(("-row-mt", "1") if spec.encoder in ("libvpx-vp9", "libaom-av1") else ()),
        *("-threads", str(spec.threads)),
        *_filters(spec),
        *(("-r", _decimal(spec.frame_rate)) if spec.frame_rate is not None else ()),
        *audio_options(spec.muxer),
    )


def _keyframes(spec: JobSpec) -> tuple[str, ...]:
    rate = spec.frame_rate
    if isinstance(spec.source, GeneratedInput):
        rate = spec.source.frame_rate
    if rate is None:  # the input's own, which only ffmpeg will know
        return ("-force_key_frames", f"expr:gte(t,n_forced*{_KEYFRAME_SEC})")
    return ("-g", str(max(1, round(_KEYFRAME_SEC * rate))))


def _has_secret(spec: JobSpec) -> bool:
    """Whether a URL must not get into the journal, where standard error goes.

    The log of the job has all that ffmpeg says, and is cleaned before it is sent.
    """
    return any(
        isinstance(place, UrlInput | StreamOutput) and redact(place.url) != place.url
        for place in (spec.source, spec.output)
    )


def _hardware(spec: JobSpec) -> tuple[str, ...]:
    device: tuple[str, ...] = ()
    if spec.encoder.endswith("_vaapi"):
        # The first device that works; named, so that the upload filter uses it too.
        device = ("-init_hw_device", "vaapi=gpu", "-filter_hw_device", "gpu")
    return device + (("-hwaccel", spec.hwaccel) if spec.hwaccel is not None else ())


def _input(spec: JobSpec, source: Path | str) -> tuple[str, ...]:
    # Of the decoder, which would take all CPUs of the host.
    threads = ("-threads", str(min(spec.threads, _MAX_DECODER_THREADS)))
    if isinstance(spec.source, UrlInput):
        protocols = _protocols(spec.source.scheme, *spec.source.further)
        return (*threads, "-protocol_whitelist", protocols, "-i", str(source))
    loop: tuple[str, ...] = ()
    if isinstance(spec.source, GeneratedInput) and spec.duration_sec is not None:
        loop = ("-stream_loop", "-1") if spec.duration_sec > spec.source.duration_sec else ()
    return (*threads, *_FILE_ONLY, *loop, "-i", _file(Path(source)))


def _filters(spec: JobSpec) -> tuple[str, ...]:
    filters: list[str] = []
    if spec.scale is not None:
        filters.append("scale={}:{}:flags=bicubic".format(*spec.scale))
        filters.append("setsar=1")  # the size that was asked for is the size that is shown
    elif not isinstance(spec.source, GeneratedInput) and codec_of(spec.encoder) in _EVEN_ONLY:
        filters.append("crop=trunc(iw/2)*2:trunc(ih/2)*2")  # at most one row and one column
    if spec.encoder.endswith("_vaapi"):
        filters += ["format=nv12", "hwupload"]
    return ("-vf", ",".join(filters)) if filters else ()


def _file(path: Path) -> str:
    """Taken literally: without the prefix, a colon could make a protocol of it."""
    return f"file:{_absolute(path)}"


def _absolute(path: Path) -> str:
    if not path.is_absolute():
        raise ValueError(f"{path} is not absolute")
    return str(path)


def _protocols(*schemes: str) -> str:
    """ffmpeg's white list for schemes: they and what carries them."""
    carriers = (carrier for scheme in schemes for carrier in _CARRIERS[scheme])
    return ",".join(dict.fromkeys((*schemes, *carriers)))


def _stream(spec: JobSpec) -> rtmp.Stream:
    if not isinstance(spec.output, StreamOutput):
        raise ValueError(f"the output of job {spec.id} is a file")
    return rtmp.split(spec.output.url)


def _decimal(value: float) -> str:
    """Without exponent or needless zeros: 30, 29.97, 0.5."""
    return f"{value:.6f}".rstrip("0").rstrip(".")


def source_name(spec: JobSpec, generated: Path) -> Path | str:
    """What ``transcode_command`` reads: the given file or URL, else the generated file."""
    if isinstance(spec.source, FileInput):
        return spec.source.path
    return spec.source.url if isinstance(spec.source, UrlInput) else generated
