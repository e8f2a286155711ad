"""Runs the server until the process is told to end."""

import asyncio
import contextlib
import ipaddress
import logging
import math
import os
import resource
import socket
import sys
from collections.abc import Iterator, Sequence

import uvicorn

from bigmac_jax.config import ConfigError
from bigmac_jax.inference import Generator
from bigmac_jax.inference.engine import Engine
from bigmac_jax.runtime.signals import stop_signals
from bigmac_jax.serving.app import Service
from bigmac_jax.serving.dialogue import Dialogue
from bigmac_jax.serving.limits import Limits
from bigmac_jax.serving.prometheus import Metrics
from bigmac_jax.serving.protocol import make_protocol
from bigmac_jax.serving.worker import Worker

_GRACE = 5.0  # seconds that the engine's last step gets when nobody waits for it any more
_log = logging.getLogger(__name__)


class _Server(uvicorn.Server):
    """Leaves signals to `serve`: uvicorn would raise them again at its end."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listen(host: str, port: int) -> socket.socket:
    """Opens the port before the model is loaded, so that one that is taken is known at once."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a file for each connection
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, UnicodeError) as error:  # the latter of what can be no name of a host
        why = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"--host={host} --port={port} cannot be listened at ({why}); choose another") from None


async def serve(
    generator: Generator,
    engine: Engine,
    chat: Dialogue,
    name: str,
    limits: Limits,
    listening: socket.socket,
    key: str = "",
    hosts: Sequence[str] = (),
) -> int:
    """Answers requests until SIGTERM or SIGINT, and then finishes those that run; a second signal ends it at once.

    Args:
      name: what requests call the model.
      listening: a socket that listens already.
      key, hosts: who may use the server, as for `access.Access`.

    Returns:
      The exit code: 1 if the engine failed.
    """
    server: _Server
    loop = asyncio.get_running_loop()

    def end() -> None:
        server.should_exit = True
        loop.call_later(limits.drain, service.end)

    worker = Worker(engine, limits, Metrics(engine), end)
    service = Service(generator, worker, chat, name, key, hosts)
    server = _Server(
        uvicorn.Config(
            service.app(),
            http=make_protocol(limits),
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=math.ceil(limits.drain) + 1,  # for what `service.end` can't reach
        )
    )
    for library in ("uvicorn.error", "asyncio"):  # they warn of every client that leaves
        logging.getLogger(library).setLevel(logging.ERROR)
    host, port = listening.getsockname()[:2]
    if not (key or ipaddress.ip_address(host).is_loopback):
        _log.warning("whoever reaches %s may use this server; --api_key_file asks for a key", host)
    with stop_signals(lambda: loop.call_soon_threadsafe(end)):
        print(f"serving {name} at http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
        await server.serve(sockets=[listening])
        ended = await worker.stop(_GRACE)
    code = int(worker.failed or not ended)
    if not ended:
        _log.error("the engine's last step did not end within %g s", _GRACE)
    if not ended or service.threads.busy_seconds:
        sys.stdout.flush()
        os._exit(code)  # what is stuck in a library can't be waited for, and breaks where Python takes it down
    return code
