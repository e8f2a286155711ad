"""Several processes as one job: how they connect, who writes, how they agree.

Everything here also works in a job of one process, where it costs nothing.
"""

import atexit
import contextlib
import ctypes
import hashlib
import inspect
import json
import logging
import os
import signal
import socket
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, TextIO

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bigmac_jax.config import ConfigError
from bigmac_jax.runtime import rendezvous, signals, stderr

EXIT_CODE = 3  # of a process that ends because another one failed
_MESSAGE = 1024  # bytes of a message between processes; a longer one is cut
_LONG = "#"  # stands before the length of a value that follows in a message of its own
_LEAST = 30  # seconds; importing takes its time, and the watchdog, which says more than jax, is to come first
_FIELDS = 512  # fields that processes compare at most
_abort_handler: Any = None


class PeerError(RuntimeError):
    """Another process of the job failed; the message names it."""


def connect(coordinator: str, num_processes: int, process_id: int, detect: bool, peer_timeout: int) -> None:
    """Connects this process to the others of its job; without arguments there are none. Call it before using devices.

    Args:
      coordinator: HOST:PORT of process 0; goes with num_processes and process_id.
      process_id: number of this process, from 0; -1 = not given.
      detect: take the three from SLURM's, Open MPI's, Cloud TPU's or GKE's environment.
      peer_timeout: jax gives up on a process that does not start, or is silent, for twice as many seconds, and not
        before half a minute; `watchdog.Watchdog`, once it runs, acts sooner and says more. 0 = jax's defaults.

    Raises:
      ConfigError: arguments that are incomplete or contradict each other or those of another process, a port in use, or
        no cluster to detect.
      PeerError: processes are missing.
    """
    if not _asks_for_processes(coordinator, num_processes, process_id, detect):
        return
    # Its own handler would hide SIGTERM from the loop, and knows nothing of SIGINT.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    seconds, options = 300, dict[str, Any]()
    if not detect:
        options |= {"coordinator_address": coordinator, "num_processes": num_processes, "process_id": process_id,
                    "cluster_detection_method": "deactivate"}  # fmt: skip
    if peer_timeout:
        seconds = max(2 * peer_timeout, _LEAST)
        options |= {"initialization_timeout": seconds, "heartbeat_timeout_seconds": seconds,
                    "shutdown_timeout_seconds": max(60, 2 * peer_timeout)}  # fmt: skip  # process 0 draws the report
    me = f"process {process_id}" if process_id >= 0 else "this process of the cluster"
    fix = "start all of them, or raise --peer_timeout"
    on_abort(lambda: _end(f"{me} did not reach all others within {seconds} s; {fix}"))
    stderr.start_filter()
    try:
        if not detect:
            rendezvous.meet(coordinator, num_processes, process_id, seconds)
        jax.distributed.initialize(**options)
    except ValueError:
        if not detect:
            raise
        raise ConfigError(
            "--distributed found no cluster (SLURM, Open MPI, Cloud TPU or GKE) in the environment; give "
            "--coordinator=HOST:PORT --num_processes=N --process_id=I instead"
        ) from None
    except rendezvous.MissingError as error:
        raise PeerError(f"{error}, {seconds} s; {fix}") from None
    except RuntimeError as error:
        if "Failed to start RPC server" in str(error):
            raise ConfigError(
                f"the coordinator's port cannot be used on {socket.gethostname()}; end what uses it"
            ) from None
        raise PeerError(
            f"{me} did not reach all others within {seconds} s ({str(error).splitlines()[0]}); {fix}"
        ) from None
    # jax.process_index() waits for the devices, and these for all processes: for ever, where one died in between.
    line = f"process {_number()} aborted: another one is gone, or the lines above say why"
    on_abort(lambda: _end(line))
    atexit.register(on_abort, None)  # before jax's own, which leaves the others
    if jax.process_index():
        logging.getLogger("bigmac_jax").setLevel(logging.WARNING)


def _asks_for_processes(coordinator: str, num_processes: int, process_id: int, detect: bool) -> bool:
    """Whether the arguments of `connect` ask for several processes; ConfigError where they contradict each other."""
    given = {"--coordinator": bool(coordinator), "--num_processes": num_processes > 0, "--process_id": process_id >= 0}
    if not any(given.values()):
        return detect
    missing = [name for name, there in given.items() if not there]
    if detect:
        raise ConfigError("--distributed takes the processes from the cluster; drop it, or --coordinator and the rest")
    if missing:
        raise ConfigError(
            f"{', '.join(missing)} missing: a process of several needs --coordinator=HOST:PORT, --num_processes=N and "
            f"--process_id=I; give all three, or --distributed to take them from the cluster"
        )
    if not 0 <= process_id < num_processes:
        raise ConfigError(f"--process_id={process_id} must be below --num_processes={num_processes}; count from 0")
    host, _, port = coordinator.rpartition(":")
    if not (host and port.isascii() and port.isdecimal() and 0 < int(port) < 1 << 16):
        raise ConfigError(
            f"--coordinator={coordinator} must be HOST:PORT with a port of 1 to 65535, as in "
            f"--coordinator=10.0.0.1:1234"
        )
    return True


def on_abort(handler: Callable[[], object] | None) -> None:
    """Calls `handler` when jax ends this process by abort(), as its own thread does when another process is lost.

    The handler is set in C, because Python's run after the signal, and after abort() nothing runs. Pass None before the
    interpreter ends: else it waits for that thread, and the thread for it.
    """
    global _abort_handler  # as long as C may call it
    _abort_handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: handler()) if handler else None
    function = ctypes.CDLL(None).signal
    function.argtypes, function.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    function(signal.SIGABRT, ctypes.cast(_abort_handler, ctypes.c_void_p))


def _end(line: str) -> NoReturn:
    print(f"error: {line}", file=sys.stderr, flush=True)
    os._exit(EXIT_CODE)


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def say(line: str, file: TextIO | None = None) -> None:
    """Prints a line once, whatever the number of processes."""
    if is_first():
        with signals.tolerate_lost_output(file or sys.stdout):
            print(line, file=file, flush=True)


def is_distributed() -> bool:
    """Whether the job has several processes."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def coordination_store() -> Any:
    """The key-value store of jax's coordination service, which the processes of a job share; None in a job of one.

    It has no public name. tests/runtime/test_coordination_store.py says what broke when another jax has it elsewhere.
    """
    return _jax_job().client


def _number() -> int:
    """This process' number, which is known before its devices are."""
    return int(_jax_job().process_id)


def _jax_job() -> Any:
    from jax._src import distributed

    return distributed.global_state


def gather(message: str) -> list[str]:
    """The messages of all processes, in each of them; waits for the last one. A long message is cut."""
    if not is_distributed():
        return [message]
    text = np.frombuffer(message.encode()[:_MESSAGE].ljust(_MESSAGE, b"\0"), np.uint8)
    return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in multihost_utils.process_allgather(text)]


def digest(value: object) -> str:
    """A few characters for `check_same` in place of a large value."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:12]


def check_same(fields: Mapping[str, Any]) -> None:
    """Checks that all processes have the same fields and values; waits for the last one.

    Raises:
      ConfigError: in all processes; it names a process, the field and its value.
    """
    if not is_distributed():
        return
    of_names = hashlib.sha256("\n".join(fields).encode()).digest()[:4]
    # In one message of a fixed size: the names, of which another version may have more, and a number for each value.
    values = np.zeros(_FIELDS, np.uint32)
    values[0] = int.from_bytes(of_names)
    values[1 : 1 + len(fields)] = [zlib.crc32(repr(value).encode()) for value in fields.values()]
    values_PF = np.asarray(multihost_utils.process_allgather(values))
    differs_F = (values_PF != values_PF[0]).any(0)
    if not differs_F.any():
        return
    names = [] if differs_F[0] else [name for name, differs in zip(fields, differs_F[1:], strict=False) if differs]
    told = gather(", ".join(f"{name}={fields[name]}" for name in names) or "another version of the program")
    other = next(process for process in range(len(told)) if (values_PF[process] != values_PF[0]).any())
    raise ConfigError(
        f"process {other} was started with {told[other]}, process 0 with {told[0]}; start all with the same command, "
        f"files and packages"
    )


class Jit:
    """`jax.jit` for programs with collectives: no process runs one before all have compiled it.

    The first collectives connect groups of processes, for which gloo waits 30 s: too short where one process finds the
    program in the cache and another compiles a large one. Keyword arguments are static. Can be used as a decorator.
    """

    def __init__(self, function: Callable[..., Any], donate_argnames: str | None = None):
        keywords = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
        self.function = function
        self._jitted = jax.jit(function, static_argnames=keywords, donate_argnames=donate_argnames)
        self._programs: dict[Any, Callable[..., Any]] = {}

    def lower(self, *arguments: Any, **static: Any) -> Any:
        """As `lower` of a function under `jax.jit`."""
        return self._jitted.lower(*arguments, **static)

    def __call__(self, *arguments: Any, **static: Any) -> Any:
        if not is_distributed():
            return self._jitted(*arguments, **static)
        leaves, tree = jax.tree.flatten(arguments)
        key = tree, tuple((leaf.shape, leaf.dtype, leaf.sharding) for leaf in leaves), tuple(sorted(static.items()))
        if key not in self._programs:
            self._programs[key] = self._jitted.lower(*arguments, **static).compile()
            gather("")
        return self._programs[key](*arguments)


@contextlib.contextmanager
def raise_together() -> Iterator[None]:
    """A context after which all processes raise if one of them raised inside; no collective may run inside.

    Raises:
      ConfigError: what this process or another one raised.
      PeerError: another process raised something else.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        if not is_distributed():
            raise
        error = caught
    kind = "" if error is None else "config" if isinstance(error, ConfigError) else type(error).__name__
    for process, line in enumerate(gather(f"{kind}\n{error}" if kind else "")):
        if line and (error is None or isinstance(error, ConfigError)):
            kind, _, text = line.partition("\n")
            if kind == "config":
                raise ConfigError(text if process == 0 else f"process {process}: {text}")
            raise PeerError(f"process {process} failed: {kind}: {' '.join(text.split())}")
    if error is not None:
        raise error


def broadcast(value: Any) -> Any:
    """Process 0's JSON value, in all processes: for what was read from files that others may see later."""
    text = json.dumps(value, allow_nan=True).encode()  # a loss may be NaN
    if not is_distributed():
        return json.loads(text)
    told = gather(text.decode() if len(text) <= _MESSAGE else f"{_LONG}{len(text)}")[0]
    if not told.startswith(_LONG):
        return json.loads(told)
    size = 1 << int(told.removeprefix(_LONG)).bit_length()  # of few sizes, each of which is a program
    return json.loads(bytes(multihost_utils.process_allgather(np.frombuffer(text[:size].ljust(size), np.uint8))[0]))


def run_on_first(find: Callable[[], Any]) -> Any:
    """Calls `find` in process 0 alone, and returns its result or raises its error in all processes."""
    with raise_together():
        found = find() if is_first() else None
    return broadcast(found)


def local_rows(sharding: NamedSharding, rows: int) -> list[int]:
    """The rows of a global batch of `rows` that this process' devices hold, in order."""
    held = sharding.addressable_devices_indices_map((rows,)).values()
    return sorted({row for index in held if index for row in range(rows)[index[0]]})


def make_global_array(sharding: NamedSharding, rows: Sequence[int], local: np.ndarray, size: int) -> jax.Array:
    """Makes the global array of `size` rows, of which `local` is this process' `rows`."""

    def shard(index: Any) -> np.ndarray:
        start = rows.index(index[0].start or 0)  # a device's rows are contiguous, and all here
        return local[start : start + len(range(size)[index[0]]), *index[1:]]

    return jax.make_array_from_callback((size, *local.shape[1:]), sharding, shard)


class StopVote:
    """Lets all processes learn at the same step that one of them wants to stop.

    A flag per device is reduced beside each step and read one step later, when it has long arrived.

    Args:
      wanted: not empty once this process wants to stop.
    """

    def __init__(self, wanted: list[int]):
        self._wanted = wanted
        self._last: jax.Array | None = None
        self._known: jax.Array | None = None
        mesh = jax.sharding.get_mesh()
        self._sharding = NamedSharding(mesh, P(mesh.axis_names))
        self._any = jax.jit(jnp.max)

    def cast(self) -> None:
        """Votes; call it after each step was dispatched."""
        if is_distributed():
            flags = np.full(self._sharding.mesh.size, bool(self._wanted), np.int32)
            votes = jax.make_array_from_callback(flags.shape, self._sharding, flags.__getitem__)
            self._known, self._last = self._last, self._any(votes)

    def passed(self) -> bool:
        """Whether any process wanted to stop when it voted at the step before the last."""
        return bool(self._known) if is_distributed() else bool(self._wanted)
