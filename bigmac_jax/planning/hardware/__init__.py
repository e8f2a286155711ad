"""Figures of the machines that can be planned for: one TOML file each, whose comments name the sources.

Rates are those of data sheets, so predicted times are lower bounds; only `matmul_efficiency` is what is reached.
"""

import dataclasses
import math
import pathlib
import tomllib
from dataclasses import dataclass
from typing import Any, get_args

from bigmac_jax.config import ConfigError
from bigmac_jax.planning.hardware.torus import Torus
from bigmac_jax.runtime import storage

_FOLDER = pathlib.Path(__file__).parent
HARDWARE = tuple(sorted(file.stem for file in _FOLDER.glob("*.toml")))


@dataclass(frozen=True)
class Link:
    """A link between devices."""

    bandwidth: float  # bytes a second that one device sends, in one direction
    latency: float  # seconds of a message, on top of its bytes


@dataclass(frozen=True)
class Hardware:
    """A machine, as its TOML file describes it."""

    platform: str  # as jax spells it, like device_kind
    device_kind: str
    peak_flops: float  # FLOPs a second of one device in 16-bit matmuls
    peak_flops_float32: float
    matmul_efficiency: float  # the share of the peak that large matmuls reach; fitted (docs/planning-truth.md)
    attention_efficiency: float  # … and that attention's kernel reaches, forward and backward
    memory_bytes: float  # of one device
    memory_bandwidth: float  # of one device, bytes a second
    machine_ranks: int  # number of devices that fast links join
    overlaps: bool  # whether exchanges run beside computation
    fast: Link  # of one device inside the machine; on a torus one link and one hop
    slow: Link  # one device's share of the machine's links to others
    host_bandwidth: float | None = None  # of one device to its host's memory, bytes a second one way
    peak_flops_8bit: float | None = None  # in 8-bit floats; None where they are no faster
    watts: float | None = None  # of one device, which bound the products of GPUs
    hidden_share: float = 1.0  # of what an overlapped exchange could hide, what it does hide
    clock_hz: float | None = None  # cycles a second, in which a TPU's compiler estimates times
    torus: Torus | None = None  # how fast links are laid out; without it a switch joins each device with each

    def peak(self, dtype: str, eight_bit: bool) -> float:
        """FLOPs a second of one device in products of this dtype, or in 8 bits where it has those."""
        return self.peak_flops_8bit or self.peak_flops if eight_bit else self.flops_per_second(dtype)

    def flops_per_second(self, dtype: str) -> float:
        """Peak FLOPs a second of one device in matmuls of this dtype."""
        return self.peak_flops_float32 if dtype == "float32" else self.peak_flops

    def ranks_together(self, ranks: int) -> int:
        """Ranks of one machine where `ranks` take as few as possible, each as many: 64 of 256 in racks of 72."""
        unit = math.gcd(ranks, self.machine_ranks)
        return max(n for n in range(unit, self.machine_ranks + 1, unit) if ranks % n == 0)

    @property
    def cores(self) -> int:
        """Devices that jax shows a chip as."""
        return self.torus.cores if self.torus else 1


def load_hardware(name_or_path: str | pathlib.Path) -> Hardware:
    """Reads a machine's figures: one of HARDWARE, or a TOML file of that form. What a file says of a chip with several
    cores is divided by them: each is a device of jax.

    Raises:
      ConfigError: no such file, or a field that is missing, unknown, of the wrong type or not above 0.
    """
    text = str(name_or_path)
    try:
        path = _FOLDER / f"{text}.toml" if text in HARDWARE else storage.locate(text, "hardware")
        values = tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except storage.errors(UnicodeDecodeError):
        raise ConfigError(
            f"hardware={text!r} can't be read as a file; use one of {', '.join(HARDWARE)}, or a path to a .toml file"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path.name} is not valid TOML ({error}); see v5e.toml for the form") from None
    hardware: Hardware = _build(Hardware, values, path.name, "")
    if hardware.platform not in ("gpu", "tpu"):
        raise ConfigError(f"{path.name}: platform={hardware.platform!r} must be gpu or tpu")
    if hardware.matmul_efficiency > 1:
        raise ConfigError(f"{path.name}: matmul_efficiency={hardware.matmul_efficiency:g} must be at most 1")
    if hardware.platform == "tpu" and (hardware.torus is None or hardware.clock_hz is None):
        missing = "torus" if hardware.torus is None else "clock_hz"
        raise ConfigError(f"{path.name}: platform='tpu' needs {missing}; see v5e.toml")
    return _of_a_core(hardware)


def _of_a_core(chip: Hardware) -> Hardware:
    n, divided = chip.cores, ("peak_flops", "peak_flops_float32", "peak_flops_8bit", "memory_bytes", "memory_bandwidth",
                  "host_bandwidth")  # fmt: skip
    figures: dict[str, Any] = {name: value / n for name in divided if (value := getattr(chip, name))}
    figures |= {name: Link(getattr(chip, name).bandwidth / n, getattr(chip, name).latency) for name in ("fast", "slow")}
    return dataclasses.replace(chip, **figures, machine_ranks=chip.machine_ranks * n)


_WORDS = {str: "a text", bool: "true or false", int: "a whole number", float: "a number"}


def _build(cls: Any, values: Any, file: str, prefix: str) -> Any:
    """The dataclass `cls` from a table of the file."""
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: {prefix.rstrip('.')}={values!r} must be a table, as [{prefix.rstrip('.')}]")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for name in values:
        if name not in fields:
            raise ConfigError(f"{file}: {prefix}{name} is not a field; use one of {', '.join(fields)}")
    for name, f in fields.items():
        if name not in values and f.default is dataclasses.MISSING:
            raise ConfigError(f"{file}: {prefix}{name} is missing; see v5e.toml for what it is")
    return cls(**{name: _field(fields[name].type, value, file, prefix + name) for name, value in values.items()})


def _field(hint: Any, value: Any, file: str, name: str) -> Any:
    kind = next((kind for kind in get_args(hint) if kind is not type(None)), hint)  # of X | None it is X
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, file, name + ".")
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise ConfigError(f"{file}: {name}={value!r} must be {_WORDS[kind]}")
    if isinstance(value, (int, float)) and not (isinstance(value, bool) or 0 < value < math.inf):
        raise ConfigError(f"{file}: {name}={value} must be a finite number above 0")
    return value
