"""Jobs that look like a client's, and then get worse."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from tests.fuzz import fragments as f

Raw = dict[str, Any]
_LIMITS = ("max_cpu_percent", "max_memory_mb", "max_disk_mb", "timeout_sec")
_WRAPPER = ("cpu_max", "cpu_weight", "memory_max_mb", "io_max")
_PARAMETERS = (
    *("input", "output", "output_mode", "rtmp_url", "stream_key", "codec", "bitrate", "preset"),
    *("duration", "duration_seconds", "resolution", "resolution_width", "resolution_height"),
    *("frame_rate", "fps", "hwaccel", "threads", "tune", "engine", "resource_limits"),
    *("classification", "-y", "i\nj", "x" * 500, "\x1b[0m"),
)
_TOP = (
    *("id", "scenario", "engine", "classification", "parameters", "resource_limits"),
    *("wrapper_constraints", "queue", "priority", "status", "retry_count", "created_at", "node_id"),
)


def make_job(rng: random.Random) -> Raw:
    """A job as JSON would give it. The same ``rng`` gives the same job."""
    job = _likely(rng)
    for _ in range(rng.choice((0, 0, 1, 1, 1, 1, 2, 2, 3, 5))):
        _worsen(rng, job)
    return job


def _likely(rng: random.Random) -> Raw:
    pick = rng.choice
    parameters: Raw = {
        "codec": pick(
            ("h264", "h264", "h264", "libx264", "h265", "vp9", "av1", "mpeg4", "h264_nvenc")
        ),
        "duration": pick((5, 10.5, 0.04, 600, 29.97)),
        "bitrate": pick(("2000k", "2M", 500000, "1.5M", 1e6)),
        "resolution": pick(("1280x720", "640x360", "1920X1080")),
        "fps": pick((25, 29.97, 60, 12.5)),
        "threads": pick((1, 2, 256)),
        "preset": pick(("ultrafast", "medium", "veryslow")),
        "hwaccel": pick(("none", "auto", "auto", "cuda")),
        "tune": pick(("film", "zerolatency", "psnr")),
        "resource_limits": {name: pick((100, 4096)) for name in _LIMITS},
    }
    for name in rng.sample(sorted(parameters), rng.randrange(4, 11)):
        del parameters[name]
    kind = rng.random()
    if kind < 0.25:
        parameters["input"] = f"{pick(f.FOLDERS[:4])}/{pick(f.NAMES[:11])}"
    elif kind < 0.5:
        parameters["input"] = url(rng, tame=rng.random() < 0.8)
    if rng.random() < 0.4:
        parameters["output_mode"] = pick(("rtmp", "stream"))
        if rng.random() < 0.7:
            parameters["rtmp_url"] = stream_url(rng)
        if rng.random() < 0.6:
            parameters["stream_key"] = f"{f.SECRET}{rng.randrange(10)}"
    elif rng.random() < 0.6:
        parameters["output"] = f"{pick(f.FOLDERS[2:6])}/{pick(f.NAMES[:11])}"
    job: Raw = {
        "id": pick(f.IDS[:3]),
        "scenario": pick(("720p30-h264", "4K60-hevc", "test one", "", "1280x720p25")),
        "parameters": parameters,
    }
    if rng.random() < 0.3:
        job["wrapper_constraints"] = {
            "cpu_max": "50000 100000", "cpu_weight": 100, "memory_max_mb": 512,
            "io_max": "8:0 rbps=1048576 wiops=max",
        }  # fmt: skip
    if rng.random() < 0.3:
        job |= {"queue": pick(("live", "batch")), "priority": pick(("high", "low"))}
    return job


def url(rng: random.Random, *, tame: bool = False) -> str:
    """A URL with secrets where secrets stand: password and query."""
    few = 7 if tame else None
    scheme = rng.choice(f.SCHEMES[: 9 if tame else None])
    user = rng.choice(("", "", f"u:{f.SECRET}@", f"{f.SECRET}@", "@", f"u:{f.SECRET}%40@"))
    host = rng.choice(f.HOSTS[:few])
    query = rng.choice(f.QUERIES[:6] if tame else f.QUERIES)
    if rng.random() < 0.3:
        query += ("&" if "?" in query else "?") + f"passphrase={f.SECRET}"
    # In an RTMP path, the last of two or more elements is a key.
    path = rng.choice(f.PATHS[:few])
    return f"{scheme}://{user}{host}{rng.choice(f.PORTS[:few])}{path}{query}"


def stream_url(rng: random.Random) -> str:
    place = f"{rng.choice(('rtmp', 'rtmps', 'RTMP'))}://{rng.choice(('', '', f'u:{f.SECRET}@'))}"
    place += f"{rng.choice(f.HOSTS[:9])}{rng.choice(f.PORTS[:7])}"
    key = rng.choice(("", f"/{f.SECRET}", f"/{f.SECRET}.mp4", f"/inst/{f.SECRET}", "/"))
    return f"{place}/live{key}{rng.choice(('', '', f'?t={f.SECRET}', f'?a=/b&t={f.SECRET}'))}"


def _worsen(rng: random.Random, job: Raw) -> None:
    where: Raw = job
    parameters = job.get("parameters")
    names: tuple[str, ...] = _TOP
    if isinstance(parameters, dict) and rng.random() < 0.75:
        where, names = parameters, _PARAMETERS
    if rng.random() < 0.15:
        name = rng.choice(("resource_limits", "wrapper_constraints"))
        inner = where.setdefault(name, {})
        if isinstance(inner, dict):
            where, names = inner, (*_LIMITS, *_WRAPPER)
    name = rng.choice(names) if rng.random() < 0.5 or not where else rng.choice(sorted(where))
    before = where.get(name)
    if isinstance(before, str) and rng.random() < 0.5:
        where[name] = _mutate(rng, before)
    elif rng.random() < 0.05:
        where.pop(name, None)
    else:
        where[name] = _FRESH.get(name, _anything)(rng)


def _mutate(rng: random.Random, text: str) -> str:
    """``text`` with something hostile in it; what is secret in it stays whole, and a secret."""
    piece = rng.choice((rng.choice(f.CHARACTERS), rng.choice(f.OPTIONS), rng.choice(f.PROTOCOLS)))
    if f.MARK in text:
        # At a place where it makes no part of a URL of a secret.
        return rng.choice((text + piece, piece + text, text.replace("://", f"://{piece}", 1)))
    place = rng.randrange(len(text) + 1)
    kind = rng.randrange(5)
    if kind == 0:
        return text[:place] + text[place + 1 :]
    if kind == 1:
        return text[:place] + piece
    if kind == 2:
        return "".join(chr(ord(c) + 0xFEE0) if c.isdigit() and c.isascii() else c for c in text)
    return text[:place] + piece + text[place:]


def _anything(rng: random.Random, depth: int = 0) -> object:
    if rng.random() < 0.005:
        return rng.choice(f.HUGE)
    kind = rng.randrange(9)
    if kind < 2:
        return rng.choice(f.NUMBERS)
    if kind < 4:
        return rng.choice(rng.choice((f.NUMERALS, f.WORDS)))
    if kind == 4:
        return rng.choice(rng.choice((f.CHARACTERS, f.OPTIONS, f.PROTOCOLS)))
    if kind == 5:
        return "".join(rng.choice(f.CHARACTERS) for _ in range(rng.randrange(4)))
    if kind == 6:
        return _path(rng)
    if depth > 2:
        return None
    if kind == 7:
        return [_anything(rng, depth + 1) for _ in range(rng.randrange(3))]
    return {
        str(rng.choice((*_PARAMETERS, *_LIMITS))): _anything(rng, depth + 1)
        for _ in range(rng.randrange(3))
    }


def _path(rng: random.Random) -> str:
    return f"{rng.choice(f.FOLDERS)}/{rng.choice(f.NAMES)}"


def _deep(rng: random.Random) -> object:
    value: object = {}
    for _ in range(rng.choice((5, 50, 150))):
        value = rng.choice(([value], {"parameters": value}))
    return value


def _or_anything(*makers: Callable[[random.Random], object]) -> Callable[[random.Random], object]:
    return lambda rng: rng.choice((*makers, *makers, _anything))(rng)


def _one_of(*choices: object) -> Callable[[random.Random], object]:
    return lambda rng: rng.choice(choices)


_place = _or_anything(url, _path, _one_of(*f.PROTOCOLS))
_number = _or_anything(_one_of(*f.NUMBERS), _one_of(*f.NUMERALS))
_word = _or_anything(_one_of(*f.WORDS), _one_of(*f.OPTIONS))
_FRESH: dict[str, Callable[[random.Random], object]] = {
    "id": _one_of(*f.IDS, *f.CHARACTERS, 5, None),
    "input": _place,
    "output": _place,
    "rtmp_url": _or_anything(stream_url, url),
    "stream_key": _or_anything(lambda rng: f.SECRET + rng.choice(f.CHARACTERS)),
    "parameters": _or_anything(_deep),
    "resource_limits": _or_anything(_deep),
    **dict.fromkeys(
        ("codec", "preset", "tune", "hwaccel", "engine", "output_mode", "queue", "priority"), _word
    ),
    **dict.fromkeys(
        (*_LIMITS, *_WRAPPER, "duration", "duration_seconds", "frame_rate", "fps", "threads"),
        _number,
    ),
    **dict.fromkeys(
        ("bitrate", "resolution", "resolution_width", "resolution_height", "retry_count"), _number
    ),
}
