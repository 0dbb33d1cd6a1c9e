"""A Hugging Face Hub on loopback, for tests: real git, real LFS, real HTTP, spoken to by unmodified clients.

```python
with HubServer() as hub:
    hub.api("alice").create_repo("org/plan", repo_type="dataset")  # alice is a member of org, bob is not
    hub.fail("status", "/commit/", "POST", status=503)  # the next commit is answered 503
    subprocess.run(["merit", "claim", "org/plan", "--group", "0"], env=hub.environ("bob"))
    hub.exchanges  # what was asked and how it was answered
```
"""

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import uvicorn
from huggingface_hub import HfApi

from .app import build_app
from .faults import Exchange, Fault, FaultKind, FaultLayer, OpenProtocol
from .repos import Hub

__all__ = ["Exchange", "Fault", "HubServer"]


class HubServer:
    """Runs a Hub in a thread, on two free ports (the Hub, and the storage that its redirects lead to)."""

    def __init__(self) -> None:
        self._folder = TemporaryDirectory(prefix="hub-", ignore_cleanup_errors=True)
        self.root = Path(self._folder.name)
        self.hub = Hub(self.root / "hub")
        self._layer = FaultLayer(build_app(self.hub))
        config = uvicorn.Config(self._layer, http=OpenProtocol, lifespan="off", log_level="error",
                                timeout_keep_alive=60, timeout_graceful_shutdown=1)  # fmt: skip
        self._server = uvicorn.Server(config)

    def __enter__(self) -> Self:
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
        urls = [f"http://127.0.0.1:{opened.getsockname()[1]}" for opened in sockets]
        self.hub.endpoint, self.hub.cdn = urls
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": sockets}, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join()
        self._folder.cleanup()

    @property
    def endpoint(self) -> str:
        return self.hub.endpoint

    @property
    def exchanges(self) -> list[Exchange]:
        """Every request so far, oldest first; clear the list to start anew."""
        return self._layer.exchanges

    def token(self, user: str) -> str:
        return self.hub.tokens[user]

    def api(self, user: str | None) -> HfApi:
        """A client in this process, speaking for "alice", "bob" or nobody."""
        return HfApi(self.endpoint, token=self.token(user) if user else False)

    def fail(self, kind: FaultKind, path: str, method: str = "GET", **options: Any) -> Fault:
        """Lets the next requests whose path contains the regular expression `path` fail; see [`Fault`]."""
        self._layer.faults.append(Fault(kind, path, method, **options))
        return self._layer.faults[-1]

    def heal(self) -> None:
        self._layer.faults.clear()

    def environ(self, user: str | None, **variables: str) -> dict[str, str]:
        """The environment of a client process: this Hub, that user's token, a cache of the user's own."""
        home = self.root / f"home-{user}"
        token = {"HF_TOKEN": self.token(user)} if user else {}
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        return kept | {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1",
                       "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
                       "OMP_NUM_THREADS": "1"} | token | variables  # fmt: skip

    def run(
        self, code: str, *arguments: str, user: str | None = "alice", **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Runs Python code in a process of its own and returns the finished process, its output as text."""
        return subprocess.run([sys.executable, "-c", code, *arguments], env=self.environ(user, **variables),
                              cwd=self.root, capture_output=True, text=True, timeout=120)  # fmt: skip
