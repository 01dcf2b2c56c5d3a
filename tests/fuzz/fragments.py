"""What hostile jobs are made of."""

from __future__ import annotations

MARK = "zQ7x"
"""In every secret that is planted, and in nothing else."""
SECRET = f"{MARK}hush"

OPTIONS = (
    *("-y", "-i", "-f", "--", "-", "-filter_complex", "-vf movie=/etc/passwd", "-report"),
    *("-fpre /etc/shadow", "-attach /etc/passwd", "-dump_attachment:t /tmp/x", "-f tee"),
    *("--help", "-init_hw_device vaapi=x", "-protocol_whitelist all", "-safe 0"),
)
PROTOCOLS = (
    *("concat:/etc/passwd|/etc/shadow", "subfile,,start,0,end,9,,:/etc/passwd", "pipe:0", "pipe:"),
    *("async:file:/etc/passwd", "cache:http://h/", "crypto:/etc/passwd", "data:text/plain,x"),
    *("tee:/tmp/a|/tmp/b", "md5:/tmp/x", "unix:/run/dbus/system_bus_socket", "fd:0", "ftp://h/a"),
    *("gopher://h:25/x", "sftp://h/x", "ipfs://x", "hls+http://h/x", "httpproxy://h/x", "file:"),
    *("rtmpt://h/a/k", "rtmpe://h/a/k", "zmq:tcp://h:1", "bluray:/dev/sr0", "concatf:/etc/x"),
    *("FILE:///etc/passwd", "file://localhost/etc/passwd", "file://h/etc/passwd", "icecast://h/a"),
)
CHARACTERS = (
    *("\0", "\n", "\r", "\t", "\x0b", "\x1b[31m", "\x1b]0;x\x07", "\x7f", "\x85", "\x9b1m"),
    *("\u2028", "\u2029", "\u202e", "\u200b", "\ufeff", "\ud800", "\udfff", "\U0010ffff", "\u0130"),
    *(" ", "  ", "\u00a0", "\u3000", "\\", "'", '"', "`", "$", "$$", "${HOME}", "$(id)", "%", "%%"),
    *("%n", "%03d", "%00", "%0a", "%2e%2e%2f", "%s", "*", "?", "[", "]", "{", "}", "<", ">", "|"),
    *(";", "&", "#", "@", "@@", "!", "=", ",", ":", "::", "/", "//", "/../", "/./", "..", "."),
    *("\u212a", "\u017f", "\uff10", "\u0663", "\u00d7", "\u2215", "\uff0f", "\uff1a", "\u00e9"),
    *("😀", "a\u0301", "null", "NaN", "None", "true", "0", "x" * 70, "y" * 300, "z" * 5000),
)
HUGE = (
    "a." * 100_000,
    "http://" + ":" * 200_000 + "x",
    "1" * 200_000,
    "/" * 200_000,
    " " * 200_000,
)
NUMBERS: tuple[object, ...] = (
    *(0, 1, -1, 2, 3, 15, 16, 17, 30, 60, 240, 241, 255, 256, 640, 641, 720, 1280, 16384, 16385),
    *(2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**9, 10**18, 10**30, 10**400, -(10**400)),
    *(0.0, -0.0, 0.1, 0.5, 1e-9, 1e-320, 1.5, 23.976, 29.97, 59.94, 1e9, 1e18, 1e308, -1e308),
    *(float("nan"), float("inf"), float("-inf"), 640.0, 640.5, True, False, None),
)
NUMERALS = (
    *("0", "1", "-1", "+1", " 1", "1 ", "1e3", "1_000", "0x10", "010", "1.5", "1.", ".5", "NaN"),
    *(
        "inf",
        "-inf",
        "٣٠",
        "\uff13\uff10",
        "²",
        "1\u00a0",
        "9" * 40,
        "1,5",
        "2000k",
        "2M",
        "2 M",
        "-2000k",
    ),
    *("2000K", "2G", "0k", "999999999999G", "1280x720", "1280\u00d7720", "1280X720"),
    *("641x360", "0x0", "1280x720x1", "1280x720;x", "1280x720:flags=print", "99999x99999", "16x16"),
)
WORDS = (
    *("h264", "h265", "hevc", "vp9", "av1", "libx264", "libx265", "libvpx", "libvpx-vp9", "H264"),
    *("libaom-av1", "libsvtav1", "mpeg4", "h264_nvenc", "hevc_nvenc", "h264_vaapi", "h264_qsv"),
    *("ultrafast", "veryfast", "medium", "slow", "placebo", "p1", "-1", "13", "lossless", "film"),
    *("grain", "zerolatency", "psnr", "hq", "auto", "none", "cuda", "vaapi", "vulkan", "copy"),
    *("ffmpeg", "gstreamer", "file", "rtmp", "stream", "live", "default", "batch", "high", "low"),
    *("medium", "production", "test", "max", "50000 100000", "max 100000", "8:0 rbps=1 wiops=max"),
    *("720p30-h264", "4K60-hevc", "1920x1080p50-vp9", "99999p0-av1", "640x360@25fps", "x" * 201),
    *("libx264,movie=/etc/passwd", "libx264:a=b", "libx264 -y", "wrapped_avframe", "rawvideo"),
)
SCHEMES = (
    *("http", "https", "rtmp", "rtmps", "rtsp", "srt", "udp", "tcp", "rtp", "file"),
    *("HTTP", "Rtmp", "ftp", "unix", "http+tcp", "httpx", "concat", "-http", "h\u0442tp", ""),
)
HOSTS = (
    *("h", "h", "example.com", "10.0.0.1", "[::1]", "[fd00::1]", "127.0.0.1", "localhost", "a_b"),
    *("", "-h", "--help", "[::g]", "[::1", "::1]", "[::1%25eth0]", "h%2f", "h\\", "h\\@i", "h@i"),
    *(
        "h#",
        "h?",
        "\u00e9",
        "xn--e1a",
        "h" * 260,
        "h;i",
        "h,i",
        "h|i",
        "*",
        "[v1.a]",
        "0x7f.1",
        "٣",
    ),
)
PORTS = (
    *("", "", "", ":1", ":80", ":1935", ":65535"),
    *(
        ":",
        ":0",
        ":65536",
        ":99999",
        ":-1",
        ":+1",
        ":٣",
        ":8x",
        ":80:80",
        ":1e3",
        ": 80",
        ":000001",
    ),
)
PATHS = (
    *("", "/", "/x", "/a/b", "/a/b/c", "/live", "/live/", "/live/inst", "/a.m3u8", "/%2e%2e/x"),
    *("//x", "/../x", "/x;y", "/a b", "/a:b", "/mp4:a/b", "/x.flv", "/\u00e9", "/" + "p" * 1200),
)
QUERIES = (
    *("", "", "?a=b", "?listen", "?listen=1", "?mode=listener", "?localaddr=127.0.0.1&ttl=3"),
    *("?fec=prompeg=l=5", "?a=b&listen=1", "?passphrase=x&x=/etc", "?x?y", "?#", "#f", "?tcp"),
    *("?sources=1.2.3.4&pkt_size=9", "?timeout=1;listen=1", "?" + "q" * 1000, "?slist=/x", "?&&"),
)
FOLDERS = (
    *("/media", "/data/in", "/work", "/work/media", "/data/out", "/out"),
    *(
        "/",
        "/etc",
        "/media/..",
        "/media/.",
        "/mediax",
        "/work/jobs/j1/files",
        "/work/root",
        "//media",
    ),
    *("/proc/self/fd", "/dev", "media", "./media", "~", "/media/../media", "/work/./media", "//"),
)
NAMES = (
    *("a.mp4", "a.mkv", "b.webm", "c.ts", "d.flv", "e.mov", "f.h264", "g.MP4", "-y.mp4", "a b.mp4"),
    *("a:b.mp4", "%03d.mp4", "passwd", "0", ".mp4", "a.", "..mp4", "a.mp4/", "a.txt", "a.sh"),
    *(
        "a.m\u212av",
        "ledger.db",
        "é" * 130 + ".mp4",
        "a'b\"c.mp4",
        "[x]*.mp4",
        "a.mp4\n",
        "a|b.mp4",
    ),
)
IDS = (
    *("j1", "job-42", "0b1f7c2e-5d7c-4b5e-9d6a-6f1f7b1e2a3c", "x-input", "x-probe", "attached-1"),
    *("..", ".", "../../x", "/", "a/b", "-", "-y", "a.service", "x" * 80, "x" * 81, "x" * 1024),
    *("x" * 1025, "", " ", "%i", "a@b", "a\\x2d", "😀", "a\nb", "\0", "\ud800", "j1-h" + "0" * 64),
)
