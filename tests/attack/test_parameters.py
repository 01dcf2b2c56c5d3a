"""Values of a job that are meant for ffmpeg's command line, for a filter or for a shell.

All of them come through the whole worker, and none of them may get as far as a unit.
"""

from __future__ import annotations

import json
from typing import Any

from tests.attack.conftest import MEDIA, Job, Target
from tests.e2e.conftest import job_units, parameters

INPUT = f"{MEDIA}/in.mp4"
MANY = 1_000_000

SMUGGLED = {
    "an option": "-f",
    "two options": "libx264 -f mpegts",
    "an option with its value": "-vf=movie=/etc/passwd",
    "a blank": "a b",
    "a semicolon": "fast;reboot",
    "a comma": "fast,movie=/etc/passwd",
    "a bracket": "[in]movie=/etc/passwd[out]",
    "a colon": "fast:log-file=/etc/x",
    "an equals sign": "keyint=1:stats=/etc/x",
    "a percent sign": "%n%s",
    "a systemd specifier": "%h",
    "a variable": "$HOME",
    "a variable in braces": "${HOME}",
    "a command": "$(reboot)",
    "backquotes": "`reboot`",
    "single quotes": "'fast'",
    "double quotes": '"fast"',
    "a backslash": "fast\\",
    "NUL": "fast\0slow",
    "a line break": "fast\n-f mpegts",
    "a pipe": "fast|reboot",
    "a file of presets": "/etc/passwd",
    "letters of another script": "f\u0430st",
}
REFUSALS = {
    "codec": "parameters.codec",
    "preset": "must be one of",
    "tune": "must be one of",
    "bitrate": "must be from 1k to 1G bit/s",
    "hwaccel": "must be one of",
    "resolution": "must be WIDTHxHEIGHT",
    "output_mode": "must be one of file, rtmp, stream",
    "threads": "must be a whole number from 1 to 256",
    "fps": "must be a number from 1 to 240",
    "duration": "must be a number from 0 to",
    "resolution_width": "must be a whole number from 16 to",
}


def job(**values: Any) -> dict[str, Any]:
    return parameters(input=INPUT, **values)


def stream(**values: Any) -> dict[str, Any]:
    # Nobody listens on port 1, should it come so far.
    url = {"rtmp_url": "rtmp://127.0.0.1:1/live", "stream_key": "key"}
    limits = {"resource_limits": {"timeout_sec": 20}}
    return parameters(**{"input": INPUT, "output_mode": "rtmp", **url, **limits, **values})


def test_nothing_is_smuggled_into_a_value(standing: Target) -> None:
    standing.all_fail(
        {
            f"{field}: {what}": Job(job(**{field: text}), says)
            for field, says in REFUSALS.items()
            for what, text in SMUGGLED.items()
        }
        | {
            f"engine: {what}": Job(
                job(), "must be one of auto, ffmpeg, gstreamer", extra={"engine": text}
            )
            for what, text in SMUGGLED.items()
        }
    )
    standing.unharmed()


SUFFIXES = (
    *("", ".", ".sh", ".so", ".m3u8", ".mpd", ".tee", ".ffmetadata", ".segment", ".mp4 -f tee"),
    *(".mp4;x", ".mp4\0.sh", ".mp4\n", ".%n", ".$x", ".\uff4dp4", ".image2", ".jpg", ".mp4/"),
)
OUT = f"{MEDIA.parent}/out"


def test_an_output_is_a_plain_file_of_a_known_kind(standing: Target) -> None:
    # A line break at an end is no part of a name: it is taken off, as blanks are.
    suffixes = [suffix for suffix in SUFFIXES if suffix.strip() != ".mp4"]
    jobs = {
        f"suffix {suffix!r}": Job(job(output=OUT + suffix), "parameters.output")
        for suffix in suffixes
    }
    for place in (
        *("/etc/x.mp4", "/etc/cron.d/../x.mp4", f"{MEDIA.parent}/../x.mp4", "/tmp/../etc/x.mp4"),
        *("x.mp4", "-y.mp4", "-f", "//etc/x.mp4", f"{MEDIA}/in.mp4"),
        *(f"{MEDIA.parent}/jobs/x/files/x.mp4", f"{MEDIA.parent}/root/x.mp4", "/dev/shm/x.mp4"),
        *(f"{MEDIA.parent}/ledger.db/x.mp4", "/proc/self/root/x.mp4", "~/x.mp4", "$HOME/x.mp4"),
        *("file:/tmp/x.mp4", "file:///tmp/x.mp4", "http://127.0.0.1/x.mp4", "tee:/tmp/x.mp4"),
        *("pipe:1.mp4", "crypto:/tmp/x.mp4", "rtmp://127.0.0.1:1/live/x.flv", "tcp://[::1]:1/x.ts"),
        *("md5:x.mp4", "[f=mp4]/tmp/x.mp4|/etc/x.mp4", f"/tmp/{'x' * 300}.mp4", "/x" * 3000),
    ):
        jobs[f"place {place[:60]}"] = Job(job(output=place), "parameters.output")
    standing.all_fail(jobs)
    standing.unharmed()


STREAM_URLS = {
    "an option": "-f",
    "another scheme": "http://127.0.0.1:1/live/x",
    "a file": "file:///etc/passwd",
    "a tee": "tee:rtmp://127.0.0.1:1/live/x|/etc/x",
    "librtmp's options": "rtmp://127.0.0.1:1/live/x swfUrl=http://x",
    "a blank": "rtmp://127.0.0.1:1/live/x y",
    "NUL": "rtmp://127.0.0.1:1/live/x\0y",
    "a line of presets": "rtmp://127.0.0.1:1/live/x\nrtmp_app=y",
    "no application": "rtmp://127.0.0.1:1",
    "no host": "rtmp:///live/x",
    "two hosts": "rtmp://good@127.0.0.1:1@evil/live/x",
    "a backslash": "rtmp://127.0.0.1\\@evil/live/x",
    "a fragment for a host": "rtmp://127.0.0.1#@evil/live/x",
    "port 0": "rtmp://127.0.0.1:0/live/x",
    "a port too large": "rtmp://127.0.0.1:65537/live/x",
    "an encoded host": "rtmp://127.0.0.1%2fevil/live/x",
    "a long application": f"rtmp://127.0.0.1:1/{'x' * 200}/y",
    "a long name": f"rtmp://127.0.0.1:1/live/{'x' * 2000}",
}


def test_a_stream_goes_to_a_server_and_nowhere_else(standing: Target) -> None:
    jobs = {
        f"rtmp_url: {what}": Job(stream(rtmp_url=url, stream_key=None), "parameters.rtmp_url")
        for what, url in STREAM_URLS.items()
    }
    for what, key in {
        "NUL": "x\0y", "a line of presets": "x\nrtmp_app=y", "a carriage return": "x\ry",
        "a climb": "..", "a dot": ".", "too long": "x" * 300, "too long, encoded": "\u20ac" * 200,
        "an escape sequence": "x\x1b]0;y\x07", "a line separator": "x\u2028y",
    }.items():  # fmt: skip
        jobs[f"stream_key: {what}"] = Job(stream(stream_key=key), "parameters.stream_key")
    for codec in ("h265", "vp9"):
        jobs[f"codec: {codec}"] = Job(stream(codec=codec), "a stream holds H.264 only")
    standing.all_fail(jobs)
    standing.unharmed()


def test_what_is_strange_in_a_key_stays_in_it(standing: Target) -> None:
    """These are keys: nothing of them is an option, a path or a URL, and nothing of them shows."""
    keys = (
        *("-f mpegts", "x;reboot", "x,y", "[x]y", "x:y", "%n", "$HOME", "${HOME}", "$(reboot)"),
        *("'x'", '"x"', "`x`", "x|y", "x&y=z", "x?y#z", "../../etc", "x\\", "rtmp_app=y", "#x"),
    )
    jobs = {repr(key): stream(stream_key=f"SECRET{key}") for key in keys} | {
        f"in a URL: {key}": stream(rtmp_url=f"rtmp://127.0.0.1:1/live/SECRET{key}")
        for key in ("|[f=flv]/etc/x", ";reboot", "$(reboot)", "%n", ",movie=x", "?listen=1")
    }
    sentence = "could not send the stream"
    results = standing.all_fail(
        {name: Job(body, sentence, "network_error") for name, body in jobs.items()}, timeout=120
    )
    for key, result in results.items():
        assert "SECRET" not in json.dumps(result), key
    standing.unharmed()


TYPES: dict[str, Any] = {
    "a list": ["x"], "an empty list": [], "an object": {"x": "y"}, "true": True,
    "a nested list": [[[[["x"]]]]],
}  # fmt: skip
TEXTS = (
    *("input", "output", "output_mode", "codec", "preset", "tune", "hwaccel", "resolution"),
    "bitrate",
)
NUMBERS = ("threads", "fps", "frame_rate", "duration", "resolution_width", "resolution_height")
STRANGE_NUMBERS: dict[str, Any] = {
    "0": 0, "-1": -1, "-0.0": -0.0, "2**63": 2**63, "10**400": 10**400, "-(10**400)": -(10**400),
    "1e300": 1e300, "text": "5", "Arabic digits": "\u0663", "an underscore": "1_000",
    "hexadecimal": "0x10", "NaN as text": "NaN", "infinity as text": "Infinity",
    "an exponent as text": "1e3", "a sign": "+5",
}  # fmt: skip
LIMITS = {
    "max_cpu_percent": "max_cpu_percent",
    "max_memory_mb": "max_memory_mb",
    "max_disk_mb": "max_disk_mb",
    # A master runs a job again whose error has that word in it.
    "timeout_sec": "time-out_sec",
}


def test_every_type_where_another_belongs(standing: Target) -> None:
    jobs: dict[str, Job] = {}
    for field in TEXTS:
        for what, value in {**TYPES, "a number": 7}.items():
            if (field, what) != ("bitrate", "a number"):
                jobs[f"{field}: {what}"] = Job(job() | _with(field, value), f"parameters.{field}")
        if field != "bitrate":
            jobs[f"{field}: 10**400"] = Job(job() | _with(field, 10**400), f"parameters.{field}")
    for field in NUMBERS:
        for what, value in {**TYPES, **STRANGE_NUMBERS}.items():
            jobs[f"{field}: {what}"] = Job(job() | _with(field, value), f"parameters.{field}")
    for what, value in {"0": 0, "7": 7, "-1": -1, "10**400": 10**400, "true": True}.items():
        jobs[f"bitrate: {what}"] = Job(job(bitrate=value), "parameters.bitrate")
    for field in ("rtmp_url", "stream_key"):
        for what, value in {**TYPES, "a number": 7}.items():
            jobs[f"{field}: {what}"] = Job(
                stream(**{field: value}), f"parameters.{field}: must be a string"
            )
    for place in ("resource_limits", "wrapper_constraints"):
        for what, value in {**TYPES, "text": "x", "a number": 7}.items():
            if not isinstance(value, dict):
                jobs[f"{place}: {what}"] = Job(job(), place, extra={place: value})
    standing.all_fail(jobs)
    standing.unharmed()


def _with(field: str, value: Any) -> dict[str, Any]:
    return {"parameters": {"input": INPUT, "duration": 1, field: value}}


def test_limits_that_are_none(standing: Target) -> None:
    jobs: dict[str, Job] = {}
    strange = {**TYPES, **STRANGE_NUMBERS, "a fraction": 1.5, "a limit of systemd": "infinity"}
    for field, said in LIMITS.items():
        for what, value in strange.items():
            jobs[f"{field}: {what}"] = Job(
                job(resource_limits={field: value}),
                (f"parameters.resource_limits.{said}", "must be a whole number from 1"),
            )
            jobs[f"job's {field}: {what}"] = Job(
                job(), f"resource_limits.{said}", extra={"resource_limits": {field: value}}
            )
    for field, values in {
        "cpu_max": (
            "1",
            "max max",
            "1000 0",
            "1e3",
            "-1",
            "\u0663000",
            "9" * 30,
            "max\0",
            7,
            ["x"],
        ),
        "io_max": (
            *("8:0", "/dev/sda rbps=1", "8:0 rbps=-1", f"8:0 rbps={2**63}", "8:0 rbps=1 rbps=2"),
            *("8:0 x=1", "8:0\nrbps", "9" * 600, 7, ["x"]),
        ),
        "cpu_weight": (-1, 10_001, 2**63, "100", 1.5, True),
        "memory_max_mb": (-1, 2**63, "100", 1.5, True),
    }.items():
        for value in values:
            # Only what sets something is an error of the two texts.
            if (field, value) != ("io_max", "8:0"):
                jobs[f"{field}: {str(value)[:40]!r}"] = Job(
                    job(),
                    f"wrapper_constraints.{field}",
                    extra={"wrapper_constraints": {field: value}},
                )
    standing.all_fail(jobs)
    standing.unharmed()


_OBJECTS = '{"a":' * 400 + "1" + "}" * 400
RAW = {
    "an infinite duration": ('{"duration": 1e999}', "parameters.duration = inf"),
    "an infinite limit": ('{"resource_limits": {"max_disk_mb": 1e999}}', "max_disk_mb = inf"),
    "less than nothing": ('{"fps": -1e999}', "parameters.fps = -inf"),
    "a number of 4,000 digits": (f'{{"threads": {"9" * 4000}}}', "a number of 13288 bits"),
    "the last of two": ('{"codec": "h264", "codec": "-f"}', "parameters.codec"),
    "a lone surrogate": (r'{"codec": "\ud800"}', "parameters.codec = '\\\\ud800'"),
    "a megabyte of text": (f'{{"codec": "{"x" * (MANY - 1000)}"}}', "too long for this node"),
    "a megabyte of name": (f'{{"{"x" * (MANY - 1000)}": 1}}', "too long for this node"),
    "10,000 parameters": (
        json.dumps({f"p{number}": number for number in range(10_000)}),
        "too many for this node",
    ),
    "lists in lists": (f'{{"codec": {"[" * 500}{"]" * 500}}}', "nested more than 64 levels deep"),
    "objects in objects": (f'{{"codec": {_OBJECTS}}}', "nested more than 64 levels deep"),
    "a list": ("[]", "parameters = a list of 0: must be an object"),
    "a list of pairs": ('[["codec", "h264"]]', "parameters = a list of 1: must be an object"),
    "a text": ('"codec=h264"', "parameters = 'codec=h264': must be an object"),
    "true": ("true", "parameters = True: must be an object"),
    "a number": ("1e999", "parameters = inf: must be an object"),
}
UNREADABLE = {
    "NaN": '{"duration": NaN}',
    "a number of 5,000 digits": f'{{"threads": {"9" * 5000}}}',
    "100,000 lists in lists": f'{{"codec": {"[" * 100_000}{"]" * 100_000}}}',
}


def hand_out(target: Target, text: str) -> str:
    """A job as the master's next answer, its parameters as they are given; its id."""
    job_id: str = target.master.submit({"scenario": "x"}, {"status": "processing"})["id"]
    body = f'{{"job": {{"id": "{job_id}", "scenario": "x", "parameters": {text}}}}}'
    target.master.fault("GET /jobs/next", "status", status=200, body=body)
    return job_id


def test_json_that_no_client_writes(standing: Target) -> None:
    wrong = {}
    for name, (text, _) in RAW.items():
        job_id = hand_out(standing, text)
        standing.master.wait(job_id)
        [result] = [one for one in standing.master.results if one["job_id"] == job_id]
        if RAW[name][1] not in result["error"] or "unit" in result["metrics"]:
            wrong[name] = result["error"][:500]
    assert wrong == {}
    standing.unharmed()


def test_answers_that_no_job_can_be_read_from(standing: Target) -> None:
    """Each is refused as a whole, and asked for again later and later; the next job is run."""
    for text in UNREADABLE.values():
        hand_out(standing, text)
        asked = len(standing.master.seen("GET /jobs/next"))
        standing.master.wait_for_request("GET /jobs/next", asked + 1)
    result = standing.run(job())
    assert result["status"] == "completed", result
    assert job_units() == []
    assert "is no JSON" in standing.worker.log()
    standing.unharmed()


def test_what_is_long_and_allowed(standing: Target) -> None:
    """Parameters that nobody knows are no parameters, however many there are."""
    result = standing.run(job(**{f"unknown\n{number}": "x" for number in range(3_000)}))
    assert result["status"] == "completed", result
    [note] = [text for text in result["analyzer_output"]["notes"] if "unknown" in text]
    assert note.startswith("unknown parameters ignored: unknown\\n0, ")
    assert note.endswith(" and 2990 more")
    standing.unharmed()
