"""The server as a process: from the first request until it is told to end."""

import asyncio
import contextlib
import ipaddress
import logging
import signal
import socket
from collections.abc import Iterator

import uvicorn

from bigmac_jax.inference import Generator
from bigmac_jax.inference.engine import Engine
from bigmac_jax.serving.app import Service
from bigmac_jax.serving.chat import Dialogue
from bigmac_jax.serving.limits import Limits
from bigmac_jax.serving.metrics import Metrics
from bigmac_jax.serving.worker import Worker

_log = logging.getLogger(__name__)


class _Server(uvicorn.Server):
    """Leaves signals to `serve`: uvicorn would raise them again at its end."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(
    generator: Generator,
    engine: Engine,
    chat: Dialogue,
    name: str,
    limits: Limits,
    listening: socket.socket,
    key: str = "",
) -> int:
    """Answers requests until SIGTERM or SIGINT, and then those that run; a second signal ends it at once.

    Returns:
      The exit code: 1 if the engine failed.
    """
    metrics = Metrics()
    server: _Server

    def end() -> None:
        if server.should_exit:
            server.force_exit = True
        server.should_exit = True

    worker = Worker(engine, limits, metrics, end)
    app = Service(generator, worker, chat, name, limits, metrics, key).app()
    server = _Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=max(1, round(limits.drain)),
        )
    )
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, end)
    host, port = listening.getsockname()[:2]
    if not (key or ipaddress.ip_address(host).is_loopback):
        _log.warning("whoever reaches %s may use this server; --api_key_file asks for a key", host)
    print(f"serving {name} at http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
    await server.serve(sockets=[listening])
    await worker.stop()
    return int(worker.failed)
