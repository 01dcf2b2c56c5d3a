"""Playlists and the like that lead elsewhere, each in the place of a media file."""

from __future__ import annotations

from tests.attack.conftest import MEDIA

BY_HTTP = {"hls of http", "dash of a server", "ffconcat of a URL"}
"""Those that lead from one server to another, as they may: that is what they are for."""


def playlists(port: int) -> dict[str, str]:
    """What a hostile server or file says; ``port`` is one that nobody may be led to."""
    victim = f"127.0.0.1:{port}"
    hls = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXT-X-VERSION:3\n"
    found = {
        f"hls of {name}": f"{hls}#EXTINF:1,\n{place}\n#EXT-X-ENDLIST\n"
        for name, place in {
            "a file": "file:///etc/passwd", "a path": "/etc/passwd", "a climb": "../../etc/passwd",
            "concat": f"concat:http://{victim}/header|file:///etc/passwd",
            "subfile": "subfile,,start,0,end,100,,:/etc/passwd", "cache": "cache:/etc/passwd",
            "gopher": f"gopher://{victim}/_x", "ftp": f"ftp://{victim}/x", "tcp": f"tcp://{victim}",
            "udp": f"udp://{victim}", "rtmp": f"rtmp://{victim}/live/x", "unix": "unix:/run/x.sock",
            "pipe": "pipe:0", "async": f"async:http://{victim}/x", "tee": f"tee:{victim}",
            "http": f"http://{victim}/x.ts", "a media file": f"{MEDIA}/in.mp4",
            "a file as a media file": "file:///etc/passwd?.ts",
        }.items()
    }  # fmt: skip
    found |= {
        "hls with a key": f'{hls}#EXT-X-KEY:METHOD=AES-128,URI="file:///etc/passwd"\n'
        "#EXTINF:1,\nx.ts\n#EXT-X-ENDLIST\n",
        "hls with a map": f'{hls}#EXT-X-MAP:URI="file:///etc/passwd"\n'
        "#EXTINF:1,\nx.ts\n#EXT-X-ENDLIST\n",
        "hls of hls": "#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\nfile:///etc/passwd\n",
        "hls with subtitles": '#EXTM3U\n#EXT-X-MEDIA:TYPE=SUBTITLES,GROUP-ID="s",NAME="s",'
        'URI="file:///etc/passwd"\n#EXT-X-STREAM-INF:BANDWIDTH=1,SUBTITLES="s"\nx.m3u8\n',
        "ffconcat": "ffconcat version 1.0\nfile /etc/passwd\n",
        "ffconcat of a URL": f"ffconcat version 1.0\nfile http://{victim}/x\n",
        "ffconcat of another file": "ffconcat version 1.0\nfile in.mp4\n",
        "ffconcat with options": "ffconcat version 1.0\nfile 'in.mp4'\noption safe 0\n"
        "option protocol_whitelist file,http,tcp\nfile /etc/passwd\n",
        "sdp": f"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
        f"m=video {port} RTP/AVP 96\na=rtpmap:96 H264/90000\n",
        "dash": _DASH.format("file:///etc/passwd"),
        "dash of a server": _DASH.format(f"http://{victim}/x"),
        "dash with an entity": '<?xml version="1.0"?><!DOCTYPE MPD [<!ENTITY x SYSTEM '
        '"file:///etc/passwd">]>' + _DASH.format("&x;"),
        "rtsp in a playlist": f"[playlist]\nFile1=rtsp://{victim}/x\n",
        "asx": f'<asx version="3.0"><entry><ref href="http://{victim}/x"/></entry></asx>',
        "srt": "1\n00:00:00,000 --> 00:00:01,000\n<font face='/etc/passwd'>x</font>\n",
        "ass": "[Script Info]\nScriptType: v4.00+\n[Fonts]\nfontname: /etc/passwd\n[Events]\n"
        "Dialogue: 0,0:00:00.00,0:00:01.00,x,,0,0,0,,x\n",
        "svg": f'<svg xmlns="http://www.w3.org/2000/svg"><image href="http://{victim}/x"/></svg>',
        "imf": f"<AssetMap><Path>http://{victim}/x</Path><Path>/etc/passwd</Path></AssetMap>",
        "ffmetadata": ";FFMETADATA1\ntitle=x\n[STREAM]\nfilename=/etc/passwd\n",
        "a reference movie": f"RTSPtext\nREF1=http://{victim}/x\n",
        "smooth streaming": f'<SmoothStreamingMedia Url="http://{victim}/x"/>',
        "vapoursynth": "import os\nos.system('touch /var/tmp/x')\n",
    }
    return found


_DASH = (
    '<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" mediaPresentationDuration="PT1S" '
    'profiles="urn:mpeg:dash:profile:isoff-main:2011"><Period><AdaptationSet '
    'mimeType="video/mp4"><Representation id="1" bandwidth="1" width="16" height="16" '
    'codecs="avc1.42c00d"><BaseURL>{}</BaseURL><SegmentBase><Initialization range="0-1"/>'
    "</SegmentBase></Representation></AdaptationSet></Period></MPD>"
)
