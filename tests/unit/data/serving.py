"""A real HTTP server on this machine that serves a folder, counts requests, and can be held up."""

from __future__ import annotations

import contextlib
import http.server
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Served:
    """A running server: ``url`` of the folder, ``requests`` by file name; answers wait while ``open`` is not set."""

    folder: Path
    url: str = ""
    requests: Counter[str] = field(default_factory=Counter)
    open: threading.Event = field(default_factory=threading.Event)


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[Served]:
    folder.mkdir(parents=True, exist_ok=True)
    served = Served(folder)
    served.open.set()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(folder))

        def do_GET(self) -> None:
            served.requests[self.path.rpartition("/")[2]] += 1
            served.open.wait(60)
            with contextlib.suppress(ConnectionError):  # the client was killed
                super().do_GET()

        def log_message(self, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        served.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield served
        finally:
            served.open.set()
            server.shutdown()
            thread.join()
