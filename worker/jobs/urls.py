"""URLs from outside, read strictly: what we take for the host is what ffmpeg connects to.

ffmpeg takes an authority apart by rules of its own (av_url_split in libavformat/utils.c), which
agree with RFC 3986 as long as nothing strange stands in it. So nothing strange may.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

_URL = re.compile(r"([A-Za-z][A-Za-z0-9]*)://([^/?#]*)((?:[/?].*)?)", re.S)
_AUTHORITY = re.compile(
    r"(?:(?P<user>[A-Za-z0-9._~!$&'()*+,;=:%-]*)@)?"
    r"(?P<host>[A-Za-z0-9_][A-Za-z0-9._-]*|\[[0-9A-Fa-f:.]+\])?"
    r"(?::(?P<port>[0-9]{1,5}))?"
)
_UNFIT = re.compile(r"[\s\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
MAX_HOST = 253
"""Of a name in DNS; ffmpeg's smallest buffer for one (RTMP) has 256 bytes."""
_MAX_USER = 1000
_MAX_USER_RTMP = 99  # ffmpeg cuts off what is longer

# What ffmpeg 5.1 reads from the query of a URL itself (udp.c, tcp.c, libsrt.c, rtpproto.c). None
# of it opens anything but the socket; what comes with later versions might.
_NUMBERS = frozenset({"pkt_size", "buffer_size", "timeout", "connect", "dscp", "ttl"})
_SOURCES = frozenset({"sources", "block", "localaddr"})
QUERY_OPTIONS = {
    "udp": _NUMBERS
    | _SOURCES
    | {"localport", "reuse", "broadcast", "fifo_size", "overrun_nonfatal", "udplite_coverage"},
    "tcp": frozenset({"listen", "timeout", "listen_timeout", "tcp_nodelay"}),
    "rtp": _NUMBERS
    | _SOURCES
    | {"rtcpport", "localport", "localrtpport", "localrtcpport", "write_to_source"},
    "srt": frozenset(
        {"maxbw", "pbkeylen", "passphrase", "enforced_encryption", "kmrefreshrate"}
        | {"kmpreannounce", "mss", "ffs", "ipttl", "iptos", "inputbw", "oheadbw", "latency"}
        | {"tsbpddelay", "rcvlatency", "peerlatency", "tlpktdrop", "nakreport", "connect_timeout"}
        | {"listen_timeout", "timeout", "payload_size", "pkt_size", "mode", "sndbuf", "rcvbuf"}
        | {"lossmaxttl", "minversion", "streamid", "smoother", "messageapi", "transtype"}
        | {"linger", "tsbpd", "snddropdelay"}
    ),
}
"""Where the query is not the server's but ffmpeg's: the options that may stand in it."""


@dataclass(frozen=True, slots=True)
class Url:
    scheme: str
    """In small letters."""
    authority: str
    host: str
    """Without brackets; empty where none is named."""
    port: int | None
    rest: str
    """Path, query and fragment, as they came."""

    def __str__(self) -> str:
        return f"{self.scheme}://{self.authority}{self.rest}"


def read_url(value: str) -> Url:
    """Take ``value`` apart. Raises ValueError with a sentence, without anything of the value."""
    if _UNFIT.search(value):
        raise ValueError("blanks and control characters must be percent-encoded in a URL")
    whole = _URL.fullmatch(value)
    if whole is None:
        raise ValueError("is no valid URL: it is scheme://host[:port]/path")
    scheme = whole[1].lower()
    parts = _AUTHORITY.fullmatch(whole[2])
    if parts is None:
        raise ValueError(
            "is no valid URL: between // and the path stands [user[:password]@]host[:port], a "
            "host by its name or address, and what else user and password hold percent-encoded"
        )
    host, port = parts["host"] or "", parts["port"]
    if host.startswith("["):
        host = host[1:-1]
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            raise ValueError("is no valid URL: what stands in brackets is no address") from None
    if len(host) > MAX_HOST:
        raise ValueError("is no valid URL: the host's name is too long")
    if port is not None and not 1 <= int(port) <= 65535:
        raise ValueError("is no valid URL: a port is a number from 1 to 65535")
    longest = _MAX_USER_RTMP if scheme.startswith("rtmp") else _MAX_USER
    if len(parts["user"] or "") > longest:
        raise ValueError("user and password in the URL are too long")
    return Url(scheme, whole[2], host, int(port) if port is not None else None, whole[3])


def check_query(url: Url) -> None:
    """Raise ValueError where the query has an option that ffmpeg is not to be given."""
    known = QUERY_OPTIONS.get(url.scheme)
    if known is None:
        return
    if "#" in url.rest:
        raise ValueError(f"a URL of the scheme {url.scheme} has no fragment (#)")
    query = url.rest.partition("?")[2]
    names = {part.partition("=")[0] for part in re.split("[&?]", query) if part}
    if not names <= known:
        raise ValueError(f"the query has an option that is not known for {url.scheme}")
