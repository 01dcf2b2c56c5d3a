"""Inputs that are more than a file or an address: ffmpeg's protocols, and playlists that use them.

What a name says is judged by the worker; what a playlist says is up to ffmpeg, which is told what
it may open, and to the unit, which has no other file to show and no network where it needs none.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.attack.conftest import MEDIA, Job, Target
from tests.attack.playlists import BY_HTTP, playlists
from tests.attack.servers import Server, ServerOverTls
from tests.e2e.conftest import parameters, running, sh, until

MARK = "root:x:0:0"
"""What /etc/passwd begins with."""
NO_PLACE = "must be an absolute path or a URL"
NO_URL = "is no valid URL"
OUTSIDE = "lies outside of INPUT_DIRS"
VICTIM = "127.0.0.1:7"


def job(place: str, **values: Any) -> dict[str, Any]:
    return parameters(input=place, resource_limits={"timeout_sec": 20}, **values)


PROTOCOLS = {
    f"{VICTIM}/x": (NO_PLACE, ("",)),
    "/etc/passwd": (
        NO_PLACE,
        (
            *("concat:/etc/passwd|", "concat:", "subfile,,start,0,end,0,,:", "file:", "FILE:"),
            *("cache:", "async:", "crypto:", "tee:", "unix:", "md5:", "link:", "pipe:", "fd:"),
            *("movie=", "amovie=", "lavfi:", "-i ", "-f lavfi -i ", "@", "|", "~", "../..", "%2f"),
            *("data:text/plain,", "concatf:", "http:", "https:", "i:", " -i ,"),
        ),
    ),
    f"http://{VICTIM}/x": (
        NO_PLACE,
        (
            *("cache:", "async:", "crypto:", "subfile,,start,0,end,0,,:", "concat:"),
            *("icecast:", "httpproxy:", "ffrtmphttp:", "-headers X -i ", "'", '"', "\\", "."),
        ),
    ),
}
SCHEMES = (
    *("concat", "subfile", "pipe", "fd", "data", "cache", "async", "crypto", "tee", "unix", "md5"),
    *("gopher", "gophers", "ftp", "sftp", "ipfs", "ipns", "mmsh", "mmst", "rtmpe", "rtmpt", "sctp"),
    *("rtmpts", "rtmpte", "icecast", "tls", "udplite", "srtp", "hls", "smb", "amqp", "zmq", "rist"),
    *("bluray", "httpproxy", "ffrtmphttp", "libssh", "prompeg", "concatf", "lavfi", "dash"),
)
PLACES = {
    "a generator": "testsrc", "a pipe": "pipe:0", "standard input": "-", "a descriptor": "fd:3",
    "an option": "-i", "an option with two dashes": "--help", "a glob": "*.mp4",
    "a climb": f"{MEDIA}/../../../../etc/passwd", "a folder": f"{MEDIA}/", "a dot": f"{MEDIA}/./x",
    "one slash": f"http:/{VICTIM}/x", "no slash": f"http:{VICTIM}/x", "three": f"http:///{VICTIM}",
    "backslashes": f"http:\\\\{VICTIM}\\x", "no scheme": f"//{VICTIM}/x", "a blank": "http ://x/",
    "empty host": "http://:80/x", "only a scheme": "http://", "file's host": "file://evil/etc/passwd",
}  # fmt: skip
URLS = (
    *("http://a@b@127.0.0.1/x", "http://a\\@127.0.0.1/x", "http://a#@127.0.0.1/x"),
    *("http://127.0.0.1\\.evil/x", "http://127.0.0.1%00.evil/x", "http://%31%32%37.0.0.1/x"),
    *("http://[::1/x", "http://::1/x", "http://[::1%25lo]/x"),
    *("http://[v1.x]/x", "http://127.0.0.1:0/x", "http://127.0.0.1:65536/x", "http://a:80:81/x"),
    *("http://a:+80/x", "http://a:8_0/x", "http://a:\u0668\u0660/x", "http://a:0x50/x"),
    *("http://a:80a/x", "http://\uff41.example/x", "http://a\u3002example/x", "http://a|b/x"),
    *("http://a;b/x", "http://-a/x", "http://.a/x", "http://$(reboot)/x", "http://{a}/x"),
    *("concat+http://a/x", "h\u0442tp://a/x", "http://a/x y", f"http://{'a' * 300}/x"),
)


def test_a_place_that_is_no_file_and_no_address(standing: Target) -> None:
    jobs = {
        f"{prefix}{place}": Job(job(prefix + place), says)
        for place, (says, prefixes) in PROTOCOLS.items()
        for prefix in prefixes
    }
    for scheme in SCHEMES:
        for spelt in (scheme, scheme.upper()):
            place = f"{spelt}://{VICTIM}/x"
            jobs[place] = Job(job(place), NO_PLACE)
            jobs[f"{spelt}+http"] = Job(job(f"{spelt}+http://{VICTIM}/x"), "parameters.input")
    for name, place in PLACES.items():
        jobs[name] = Job(job(place), "parameters.input")
    for place in URLS:
        jobs[place[:60]] = Job(job(place), "parameters.input")
    for place in ("file:///etc/passwd", "FILE://localhost/etc/passwd", "/etc/passwd", "/dev/stdin"):
        jobs[place] = Job(job(place), OUTSIDE)
    for place in ("/proc/self/fd/0", "/proc/self/environ", "file:///%65tc/passwd", "/dev/fd/3"):
        jobs[place] = Job(job(place), OUTSIDE)
    for what in ("\n-i /etc/passwd", "\0", "\x1b[2J", "\u2028"):
        for place in (f"{MEDIA}/in.mp4", f"http://{VICTIM}/x", "file:///x"):
            jobs[f"{place}{what!r}"] = Job(job(f"{place}{what}x"), "control characters")
    for query in (
        "udp://@:1?fifo=1", "tcp://127.0.0.1:7?listen_path=/x", "srt://127.0.0.1:7?x=y",
        "rtp://127.0.0.1:7?fec=prompeg", "udp://127.0.0.1:7#x",
    ):  # fmt: skip
        jobs[query] = Job(job(query), "parameters.input")
    standing.all_fail(jobs)
    standing.unharmed()


@pytest.fixture
def narrow(standing: Target) -> Iterator[Target]:
    with standing.configured(INPUT_PROTOCOLS="https", OUTPUT_PROTOCOLS="file"):
        yield standing


def test_what_the_operator_has_not_allowed(narrow: Target, media: Path, server: Server) -> None:
    of = "is not allowed here (INPUT_PROTOCOLS)"
    jobs = {
        f"an input by {scheme}": Job(job(f"{scheme}://{VICTIM}/x"), f"{scheme} {of}")
        for scheme in ("http", "rtmp", "rtmps", "rtsp", "srt", "udp", "tcp", "rtp")
    }
    jobs |= {
        f"a file as {place}": Job(job(place), "files are not allowed here (INPUT_PROTOCOLS)")
        for place in (str(media), f"file://{media}", "/etc/passwd")
    }
    jobs |= {
        f"an output by {scheme}": Job(
            parameters(output_mode="rtmp", rtmp_url=f"{scheme}://127.0.0.1:1/live/x"),
            f"{scheme.lower()} is not allowed here (OUTPUT_PROTOCOLS)",
        )
        for scheme in ("rtmp", "rtmps", "RTMP")
    }
    jobs["an output by the default"] = Job(
        parameters(output_mode="rtmp"), "rtmp is not allowed here (OUTPUT_PROTOCOLS)"
    )
    # By the scheme that is allowed comes what leads to those that are not.
    with ServerOverTls() as secure:
        for name, text in playlists(server.port).items():
            secure.pages[name] = text
            if ".invalid" not in text:
                jobs[f"over TLS: {name}"] = Job(job(secure.url(name)), "", FAILURES)
        results = narrow.all_fail(jobs, timeout=120)
        assert set(secure.seen) >= set(secure.pages), "each was looked at"
    leaves_no_trace(results)
    assert server.seen == [], "nothing that is not allowed is asked for"
    narrow.unharmed()


@pytest.fixture
def without_files(standing: Target) -> Iterator[Target]:
    with standing.configured(OUTPUT_PROTOCOLS="rtmp", INPUT_PROTOCOLS="http"):
        yield standing


def test_outputs_to_files_that_are_not_allowed(without_files: Target) -> None:
    says = "files are not allowed here (OUTPUT_PROTOCOLS)"
    without_files.all_fail(
        {
            "the default": Job(parameters(), says),
            "one that is named": Job(parameters(output=f"{MEDIA.parent}/x.mp4"), says),
            "https": Job(job("https://127.0.0.1:7/x"), "https is not allowed"),
            "rtmps": Job(
                parameters(output_mode="rtmp", rtmp_url="rtmps://127.0.0.1:1/live/x"),
                "rtmps is not allowed here (OUTPUT_PROTOCOLS)",
            ),
        }
    )
    without_files.unharmed()


FAILURES = "input_error|network_error|runtime_error|timeout|user_error|resource_error"


def leaves_no_trace(results: dict[str, Any]) -> None:
    """Nothing of the host's files is in what the master is told, or in the journal."""
    assert MARK not in json.dumps(results)
    sh("journalctl", "--sync")
    # All of it: to pick out the units, of which there are many, takes half a minute.
    assert MARK not in sh("journalctl", "-b", "-o", "cat")


def test_a_playlist_from_a_server_leads_to_no_file(standing: Target, server: Server) -> None:
    """With all the protocols that are allowed when nothing is said."""
    with socket.create_server(("127.0.0.1", 0)) as victim:
        port = victim.getsockname()[1]
        for name, text in playlists(port).items():
            if name not in BY_HTTP:
                server.pages[name] = text
        results = standing.all_fail(
            {name: Job(job(server.url(name)), "", FAILURES) for name in server.pages}, timeout=120
        )
        assert set(server.seen) >= set(server.pages), "each was looked at"
        victim.setblocking(False)
        with pytest.raises(BlockingIOError):  # nobody came
            victim.accept()
    leaves_no_trace(results)
    asked = {name for name in server.seen if name not in server.pages}
    assert asked <= {
        "etc/passwd",
        "x.ts",
        "x.m3u8",
        f"{MEDIA}/in.mp4"[1:],
        "in.mp4",
        "header",
        "",
        "file:///etc/passwd",
    }, "on the server itself, whose own files they would be"
    assert not any(MARK in body for body in server.bodies)
    standing.unharmed()


def test_a_playlist_that_calls_itself_a_video(standing: Target, server: Server) -> None:
    """As a file where inputs are: it leads neither to another file nor to anybody else."""
    texts = playlists(server.port)
    texts["a link to a server"] = f"http://127.0.0.1:{server.port}/x\n"
    for number, text in enumerate(texts.values()):
        path = MEDIA / f"hostile-{number}.{('mp4', 'mkv', 'ts', 'avi')[number % 4]}"
        path.write_text(text)
        path.chmod(0o644)
    try:
        standing.take_note()
        jobs = {}
        for number, name in enumerate(texts):
            suffix = ("mp4", "mkv", "ts", "avi")[number % 4]
            jobs[name] = Job(job(f"{MEDIA}/hostile-{number}.{suffix}"), "", FAILURES)
        results = standing.all_fail(jobs, timeout=120)
        leaves_no_trace(results)
        assert server.seen == []
        assert server.connections == 0
        standing.unharmed()
    finally:
        for path in MEDIA.glob("hostile-*"):
            path.unlink()
        standing.take_note()


def test_a_name_like_a_protocol_is_the_name_of_a_file(standing: Target, media: Path) -> None:
    names = ("concat:x.mp4", "http:x.mp4", "%d.mp4", "pipe:0", "-i.mp4", "a,b;c[d]'e.mp4", "$x.mp4")
    for name in names:
        (MEDIA / name).write_bytes(media.read_bytes())
    try:
        standing.take_note()
        results = standing.run_all({name: Job(job(f"{MEDIA}/{name}")) for name in names})
        assert {result["status"] for result in results.values()} == {"completed"}, results
        standing.unharmed()
    finally:
        for name in names:
            (MEDIA / name).unlink()
        standing.take_note()


def test_where_clouds_tell_their_secrets(standing: Target, server: Server) -> None:
    """The address is on this host, and somebody listens there: nobody comes."""
    server.hold.clear()
    job_id = standing.master.submit(job(server.url("hang")))["id"]
    unit = running(job_id)
    denied = sh("systemctl", "show", unit, "-p", "IPAddressDeny", "--value").split()
    server.hold.set()
    standing.master.wait(job_id, 60)
    assert set(denied) == {"169.254.0.0/16", "fe80::/64", "fd00:ec2::254/128"}
    sh("ip", "address", "add", "169.254.169.254/32", "dev", "lo")
    try:
        with Server("169.254.169.254") as metadata:
            socket.create_connection((metadata.host, metadata.port)).close()
            until(lambda: metadata.connections == 1, name="the test itself comes through")
            results = standing.all_fail(
                {
                    "http": Job(job(metadata.url("latest/meta-data")), "", "network_error"),
                    "tcp": Job(job(f"tcp://169.254.169.254:{metadata.port}"), "", FAILURES),
                    "as IPv6": Job(
                        job(f"http://[::ffff:169.254.169.254]:{metadata.port}/x"), "", FAILURES
                    ),
                    "as a number": Job(
                        job(f"http://2852039166:{metadata.port}/x"), "", "network_error"
                    ),
                },
                timeout=120,
            )
            assert metadata.connections == 1, results
    finally:
        sh("ip", "address", "del", "169.254.169.254/32", "dev", "lo")
    standing.unharmed()
