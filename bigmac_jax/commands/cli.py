"""What the commands share: flags and the config's overrides, errors as one line, the mesh, several processes."""

import functools
import logging
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

import jax
from absl import app, flags
from absl import logging as absl_logging

from bigmac_jax.commands import fail
from bigmac_jax.config import Config, ConfigError, field_docs
from bigmac_jax.config.names import ask, nearest, nearest_field, question
from bigmac_jax.config.other_names import other_field, other_flag
from bigmac_jax.config.reading import list_shipped
from bigmac_jax.config.section import all_field_types, flat_values
from bigmac_jax.model.mesh import make_mesh
from bigmac_jax.runtime import environment, hosts, known_errors, signals, storage, watchdog
from bigmac_jax.runtime.clock import clock, process_start
from bigmac_jax.runtime.kept_programs import keep_programs

CPU_DEVICES = flags.DEFINE_integer("cpu_devices", 0, "Run on this many simulated CPU devices.", lower_bound=0)
OVERRIDES: list[str] = []  # what the command line gave as --config.a.b=value
ARGUMENTS: list[str] = []  # and what was no flag, of a command that takes such
_TEXTS = (".txt", ".md", ".jsonl", ".json", ".csv", ".parquet", ".arrow", ".gz", ".zst")
_log = logging.getLogger(__name__)


def run(main: Callable[[], int | None], arguments: bool = False, distributed: bool = False) -> None:
    """Parses the command line and calls `main`; never returns.

    Args:
      arguments: whether the command takes some that are no flags.
      distributed: whether it may run as several processes.
    """
    if distributed:
        _define_host_flags()
    app.run(functools.partial(_guard, main, distributed), flags_parser=functools.partial(_parse, main, arguments))


def _parse(main: Callable[[], int | None], arguments: bool, argv: Sequence[str]) -> list[str]:
    """Parses flags, collects OVERRIDES and ARGUMENTS, and returns the program's name."""
    names = [flag.name for flag in _flags(main.__module__, sys.argv[0], __name__)]
    if any(argument in ("-h", "-help", "--help") for argument in argv[1:]):
        _show(_help(main))
    try:
        rest = _take_overrides(list(argv))
        extra = flags.FLAGS(rest)[1:]
    except flags.UnrecognizedFlagError as error:
        fail(unknown_flag(error.flagname, names))
    except flags.IllegalFlagValueError as error:
        fail(_wrong_value(str(error)))
    except (ConfigError, flags.Error) as error:
        fail(" ".join(str(error).split()))
    if extra and not arguments:
        fail(f"{extra[0]!r} is not a flag; {meant_argument(extra[0], names)}")
    ARGUMENTS.extend(extra)
    return rest[:1]


def _guard(main: Callable[[], int | None], distributed: bool, _: Sequence[str]) -> int | None:
    """Runs `main` on the devices and processes that the flags ask for → the exit code; errors are one line."""
    clock.begin("imports", process_start())
    absl_logging.set_verbosity(absl_logging.WARNING)  # Orbax and Grain log every step of theirs at INFO
    logging.getLogger("bigmac_jax").setLevel(logging.INFO)
    absl_logging.get_absl_handler().setFormatter(LineFormatter())
    given = flags.FLAGS
    if CPU_DEVICES.value:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", CPU_DEVICES.value)
    try:
        clock.switch("devices")
        if distributed:
            hosts.connect(
                given.coordinator, given.num_processes, given.process_id, given.distributed, given.peer_timeout
            )
        clock.switch("start")
        with watchdog.watch_job(given.peer_timeout if distributed else 0):
            return main()
    except ConfigError as error:
        fail(str(error) if hosts.is_first() else "")
    except hosts.PeerError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return hosts.EXIT_CODE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return 130  # as a shell counts SIGINT
    except BrokenPipeError:
        return _end_unread()
    except Exception as error:
        line = known_errors.explain(error)
        if not line:
            raise
        print(f"error: {line}", file=sys.stderr, flush=True)
        return 1 if clock.trained or storage.is_store_error(error) else 2


class LineFormatter(logging.Formatter):
    """Log lines as the commands' other lines: a warning is called one, and what a library says has its name."""

    def format(self, record: logging.LogRecord) -> str:
        own = record.name.partition(".")[0] == "bigmac_jax"
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        return level + ("" if own else f"{record.name}: ") + super().format(record)


def given_fields() -> list[str]:
    """Names of the fields that the command line gave."""
    return list(dict.fromkeys(override.partition("=")[0] for override in OVERRIDES))


def warn(lines: Iterable[str]) -> None:
    """Logs lines once, whatever the number of processes."""
    for line in lines if hosts.is_first() else ():
        _log.warning("%s", line)


def enter_mesh(config: Config, fit_batch: bool = True) -> jax.sharding.Mesh:
    """Makes the config's mesh the current one, and keeps compiled programs in config.cache_dir, unless
    $JAX_COMPILATION_CACHE_DIR says where."""
    keep_programs(config.cache_dir)
    with clock.timed("devices"):
        mesh = make_mesh(config, fit_batch)
    idle = set(range(jax.process_count())) - {device.process_index for device in mesh.devices.flat}
    if idle:
        raise ConfigError(
            f"the mesh's {mesh.size} ranks leave process {min(idle)} of {jax.process_count()} without a device; "
            f"use all {jax.device_count()} devices, or fewer processes"
        )
    if len(replicas := mesh.devices) > 1:
        processes = [{device.process_index for device in replica.flat} for replica in replicas]
        watchdog.belong_to([f"replica {n}" for n, of in enumerate(processes) if jax.process_index() in of])
    jax.set_mesh(mesh)
    return mesh


def agree(config: Config | None, command: str) -> None:
    """Waits for all processes, and checks that they have the same config, flags, versions and code.

    Args:
      config: all but its cache_dir is compared; None: the overrides are.
      command: the module whose flags are compared, but for --config, which each machine may have elsewhere.

    Raises:
      ConfigError: on all processes, where one was started with something else.
    """
    names = [flag.name for flag in _flags(command) if flag.name != "config"] + ["num_processes", "peer_timeout"]
    fields: dict[str, Any] = environment.software_versions() | {f"--{name}": flags.FLAGS[name].value for name in names}
    # By which programs are compiled.
    fields["$BIGMAC_KEEP_ENV"] = "set" if "BIGMAC_KEEP_ENV" in os.environ else "not set"
    if config is None:
        fields |= {"overrides": OVERRIDES}
    else:
        fields |= {name: value for name, value in flat_values(config).items() if name != "cache_dir"}
    hosts.check_same(fields)


def _define_host_flags() -> None:
    flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0, for a job of several processes (docs/hosts.md).")
    flags.DEFINE_integer("num_processes", 0, "Of the job.", lower_bound=0)
    flags.DEFINE_integer("process_id", -1, "Of this process, from 0.", lower_bound=-1)
    flags.DEFINE_bool("distributed", False, "Take these from SLURM's, Open MPI's, Cloud TPU's or GKE's environment.")
    flags.DEFINE_integer(
        "peer_timeout",
        120,
        "Seconds after which a process that is silent, or hangs, ends the job; 0 = only jax looks, "
        "which gives up on one that is silent for 100 s.",
        0,
    )


def unknown_flag(name: str, known: Sequence[str]) -> str:
    """The line for a flag that is none of `known`."""
    return f"--{name} is not a flag; {_meant(name, known)}"


def _meant(name: str, known: Sequence[str]) -> str:
    """Suggests what a name that is no flag may be: a flag, or a field of the config without its --config."""
    name = name.lstrip("-").partition("=")[0]
    fields = list(all_field_types(Config))
    if near := other_flag(name, known) or ([] if other_field(name) else nearest(name, known)):
        return question(near, "--")
    inner = name.partition(".")[2]  # of a misspelled config
    return question(nearest_field(inner if "." in inner else name, fields), "--config.") or "see --help"


def meant_argument(argument: str, known: Sequence[str]) -> str:
    """Suggests the flag, of those that a command has, which something that stands without one may belong to."""
    file = argument.partition(":")[0]
    may = {
        "config": file in list_shipped() or file.endswith((".py", "config.json")),
        "text_file": file.endswith((".txt", ".md")),
        "sources": file.endswith(_TEXTS),
        "config.data.source": file.endswith(_TEXTS) and "config" in known,
        "workdir": "/" in file and " " not in file,
        "prompt": " " in argument,
    }
    for flag, fits in may.items():
        if fits and "=" not in argument and flag in (*known, "config.data.source"):
            shown = f"'{argument}'" if " " in argument else argument
            return f"did you mean --{flag}={shown}?"
    return _meant(argument, known)


def _wrong_value(error: str) -> str:
    """The line for a flag's value that absl has refused with `flag --NAME=VALUE: REASON`."""
    name, _, value = error.partition(": ")[0].removeprefix("flag --").partition("=")
    parser = flags.FLAGS[name].parser
    choices = getattr(parser, "enum_values", None) or (("true", "false") if flags.FLAGS[name].boolean else ())
    words = f"one of {', '.join(filter(None, choices))}" if choices else parser.syntactic_help
    return " ".join(f"--{name}={value} must be {words}{ask(value, list(choices))}".split())


def _flags(*modules: str) -> list[flags.Flag]:
    """The flags that some modules define or adopt; those of libraries are nobody's concern."""
    found = {flag.name: flag for module in modules for flag in flags.FLAGS.get_key_flags_for_module(module)}
    return [found[name] for name in sorted(found)]


def _help(main: Callable[[], int | None]) -> str:
    def described(flag: flags.Flag) -> str:
        shown = str(flag.default).lower() if flag.boolean else flag.default
        return f"  --{flag.name}" + (f"={shown}" if shown not in (None, "", []) else "") + f"\n      {flag.help}"

    return "\n".join(
        [
            (sys.modules[main.__module__].__doc__ or "").strip(),
            *("", "Flags:", *map(described, _flags(main.__module__, sys.argv[0]))),
            *("", "Flags of other commands, too:", *map(described, _flags(__name__)), ""),
            "Fields of a config: --config.GROUP.FIELD=VALUE, as in --config.model.top_k=8 or --config.mesh.fsdp=true.",
            "`bigmac fields` or --config.help lists them, --config.model.help those of a group.",
        ]
    )


def _take_overrides(argv: list[str]) -> list[str]:
    """Moves --config.a.b=value and --config.a.b value from argv to OVERRIDES; --config.help ends here."""
    rest, queue = argv[:1], argv[1:]
    while queue:
        argument = queue.pop(0)
        name = argument.lstrip("-")
        if not (argument.startswith("-") and name.startswith("config.")):
            rest.append(argument)
            continue
        name = name.removeprefix("config.")
        if name == "help" or name.endswith(".help"):
            _show(field_docs.describe([name.removesuffix("help").rstrip(".")]))
        if "=" not in name and queue and not queue[0].startswith("--"):
            name += "=" + queue.pop(0)
        OVERRIDES.append(name)
    return rest


def _show(text: str) -> NoReturn:
    """Prints what was asked for instead of the command, and ends."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        sys.exit(_end_unread())
    sys.exit(0)


def _end_unread() -> int:
    """The exit code where the reader of standard output, as head, has seen enough: as a shell counts SIGPIPE."""
    signals.discard_output(sys.stdout)
    return signals.UNREAD
