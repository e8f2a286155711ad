"""What the commands share: flags → config → one call, errors as one line, exit code 2 for a bad configuration."""

import logging
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

import jax
from absl import app, flags
from absl import logging as absl_logging

from bigmac_jax import hosts
from bigmac_jax.config import Config, ConfigError
from bigmac_jax.mesh import make_mesh

CPU_DEVICES = flags.DEFINE_integer("cpu_devices", 0, "Run on this many simulated CPU devices.", lower_bound=0)
OVERRIDES: list[str] = []  # what the command line gave as --config.a.b=value
ARGUMENTS: list[str] = []  # and what was no flag, of a command that takes such


def run(main: Callable[[], int | None], arguments: bool = False, distributed: bool = False) -> None:
    """Parses the command line and calls `main`; never returns.

    Args:
      arguments: whether the command takes some that are no flags.
      distributed: whether it may run as several processes.
    """
    if distributed:
        _define_host_flags()

    def parse(argv: Sequence[str]) -> list[str]:
        rest = _take_overrides(list(argv))
        try:
            extra = flags.FLAGS(rest)[1:]
        except flags.Error as error:
            _fail(" ".join(str(error).split()))
        if arguments:
            ARGUMENTS.extend(extra)
        elif extra:
            _fail(f"{extra[0]!r} is not a flag; see --help")
        return rest[:1]

    def guarded(_: Sequence[str]) -> int | None:
        absl_logging.set_verbosity(absl_logging.WARNING)  # Orbax and Grain log every step of theirs at INFO
        logging.getLogger("bigmac_jax").setLevel(logging.INFO)
        if CPU_DEVICES.value:
            jax.config.update("jax_platforms", "cpu")
            jax.config.update("jax_num_cpu_devices", CPU_DEVICES.value)
        try:
            if distributed:
                given = flags.FLAGS
                hosts.start(
                    given.coordinator, given.num_processes, given.process_id, given.distributed, given.peer_timeout
                )
            return main()
        except ConfigError as error:
            _fail(str(error) if hosts.is_first() else "")
        except hosts.PeerError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            return hosts.EXIT_CODE
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr, flush=True)
            return 130  # as a shell counts SIGINT
        except BrokenPipeError:  # the reader of standard output has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141  # as a shell counts SIGPIPE

    app.run(guarded, flags_parser=parse)


def enter_mesh(config: Config, fit_batch: bool = True) -> jax.sharding.Mesh:
    """Makes the mesh current for the process, and compiled programs kept between runs."""
    jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(config.cache_dir).expanduser() / "programs"))
    mesh = make_mesh(config, fit_batch)
    idle = set(range(jax.process_count())) - {device.process_index for device in mesh.devices.flat}
    if idle:
        raise ConfigError(
            f"the mesh's {mesh.size} ranks leave process {min(idle)} of {jax.process_count()} without a device; "
            f"use all {jax.device_count()} devices, or fewer processes"
        )
    jax.set_mesh(mesh)
    return mesh


def _define_host_flags() -> None:
    flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0, for a job of several processes (docs/hosts.md).")
    flags.DEFINE_integer("num_processes", 0, "Of the job.", lower_bound=0)
    flags.DEFINE_integer("process_id", -1, "Of this process, from 0.", lower_bound=-1)
    flags.DEFINE_bool("distributed", False, "Take these from SLURM's, Open MPI's, Cloud TPU's or GKE's environment.")
    flags.DEFINE_integer(
        "peer_timeout", 120, "Seconds after which a process that is silent, or hangs, ends the job; 0 = never.", 0
    )


def _take_overrides(argv: list[str]) -> list[str]:
    """Moves --config.a.b=value and --config.a.b value from argv to OVERRIDES."""
    rest, queue = argv[:1], argv[1:]
    while queue:
        argument = queue.pop(0)
        name = argument.lstrip("-")
        if not (argument.startswith("-") and name.startswith("config.")):
            rest.append(argument)
            continue
        if "=" not in name and queue and not queue[0].startswith("--"):
            name += "=" + queue.pop(0)
        OVERRIDES.append(name.removeprefix("config."))
    return rest


def _fail(message: str) -> NoReturn:
    """`message` is empty where another process has printed it."""
    if message:
        print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)
