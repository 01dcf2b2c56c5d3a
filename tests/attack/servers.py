"""Web servers that jobs are led to."""

from __future__ import annotations

import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import trustme


class Server:
    """Gives ``pages``, and remembers who asked for what."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        self.pages: dict[str, str] = {}
        self.seen: list[str] = []
        self.bodies: list[str] = []
        self.connections = 0
        self.hold = threading.Event()
        self.hold.set()
        self.scheme = "http"
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def setup(self) -> None:
                outer.connections += 1
                super().setup()

            def do_GET(self) -> None:
                name = self.path[1:].replace("%20", " ")
                outer.seen.append(name)
                outer.bodies.append(f"{self.requestline}\n{self.headers}")
                outer.hold.wait()
                text = outer.pages.get(name)
                self.send_response(200 if text is not None else 404)
                body = (text or "").encode()
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_PUT = do_HEAD = do_GET  # noqa: N815

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer((host, 0), Handler)
        self._server.handle_error = lambda *args: None  # type: ignore[method-assign]
        self.host = host
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    def url(self, name: str) -> str:
        return f"{self.scheme}://{self.host}:{self.port}/{name.replace(' ', '%20')}"

    def __enter__(self) -> Server:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.hold.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def over_tls(self) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.scheme = "https"


class ServerOverTls(Server):
    def __init__(self) -> None:
        super().__init__()
        self.over_tls()
