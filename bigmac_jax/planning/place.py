"""What a plan is asked for, and the machine that it is for."""

import math
from dataclasses import replace
from typing import NamedTuple

from bigmac_jax.config import Config, ConfigError
from bigmac_jax.model.counts import Sizes
from bigmac_jax.model.mesh import ExpertGroup, axis_sizes, check_links
from bigmac_jax.planning import topologies
from bigmac_jax.planning.candidates import HEADROOM, Machine
from bigmac_jax.planning.cluster import cluster, mesh_group, physical_group
from bigmac_jax.planning.hardware import Hardware, load_hardware
from bigmac_jax.planning.hardware.torus import Shape
from bigmac_jax.planning.load import EVEN, Load, read_load


class Request(NamedTuple):
    """What is asked beside the counts; each field is a flag of plan.py."""

    devices: int = 0
    topology: str = ""
    slices: int = 1  # of that topology, with slow links between
    hardware: str = ""
    compile: bool = False
    options: bool = False
    terms: bool = False
    imbalance: str = ""
    paper: bool = False
    sweep: tuple[str, ...] = ()
    search: bool = False
    headroom: float = HEADROOM  # the share of memory that a search leaves free
    tokens: str = ""  # that a training takes, as 15T
    compare: bool = False
    scale: str = ""  # numbers of devices, as 64..65536


class Place(NamedTuple):
    """The machine that a plan is for."""

    devices: int
    topology: topologies.Topology | None
    hardware: Hardware | None
    simulated: bool  # the program of CPU devices is compiled, and their exchanges are what is counted
    load: Load = EVEN

    @property
    def torus(self) -> Shape | None:
        """Chips along each axis of a TPU slice."""
        return self.topology.torus if self.topology else None


def find_place(config: Config, request: Request) -> Place:
    topology = topologies.parse_topology(request.topology, request.slices) if request.topology else None
    if request.slices > 1 and not topology:
        raise ConfigError(f"--slices={request.slices} says how many of a --topology there are, as --topology=v6e:4x8")
    name = request.hardware or (topology.kind if topology else "")
    hardware = load_hardware(name) if name else None
    devices = request.devices or max(1, config.mesh.data) * config.mesh.fixed_ranks
    if topology:
        machine = load_hardware(topology.kind)
        devices = topology.chips * machine.cores
        if request.devices not in (0, devices):
            raise ConfigError(f"--devices={request.devices} must be the {devices} of --topology={topology.name}")
        if hardware and hardware.device_kind != machine.device_kind:
            raise ConfigError(
                f"--hardware={request.hardware} is of {hardware.device_kind}, but --topology={topology.name} has "
                f"{machine.device_kind}; leave --hardware out"
            )
        if hardware and topology.torus is None:
            most, together = hardware.machine_ranks, topology.shape[1]
            if together > most:
                raise ConfigError(
                    f"--topology={topology.name} has {together} GPUs together, but NVLink joins at most {most} "
                    f"{hardware.device_kind}; use --topology={topology.kind}:{-(-devices // most)}x{most}"
                )
            hardware = replace(hardware, machine_ranks=together)
    elif hardware:
        hardware = _filled(hardware, devices)
    load = read_load(request.imbalance, config)
    return Place(devices, topology, hardware, request.compile and topology is None, load)


def machine_of(request: Request, place: Place, devices: int) -> Machine:
    """The plan's machine with another number of devices."""
    hardware = require_hardware(place, "--scale")
    if place.topology is None:
        hardware = load_hardware(request.hardware)
    return Machine(devices, _filled(hardware, devices), load=place.load, headroom=request.headroom)


def _filled(hardware: Hardware, devices: int) -> Hardware:
    """The hardware with as many GPUs of a machine as so many devices take of each."""
    if hardware.torus is None and (together := hardware.ranks_together(devices)) > math.gcd(
        devices, hardware.machine_ranks
    ):
        return replace(hardware, machine_ranks=together)
    return hardware


def require_hardware(place: Place, flag: str) -> Hardware:
    if place.hardware is None:
        raise ConfigError(f"{flag} needs the time of a step; add --hardware=NAME, as in --hardware=h100")
    return place.hardware


def mesh_sizes(config: Config, place: Place) -> Sizes:
    """Ranks by axis of the mesh; ConfigError if devices would be idle."""
    mesh, devices = config.mesh, place.devices
    data = mesh.data or max(1, devices // mesh.fixed_ranks)
    if (ranks := data * mesh.fixed_ranks) != devices:
        other = "another mesh or --topology" if place.topology else f"another mesh, or --devices={ranks}"
        raise ConfigError(
            f"{mesh.describe(data)} = {ranks} must be the {devices} devices that are planned for; use {other}"
        )
    sizes = axis_sizes(config, devices)
    if place.hardware and (near := cluster(sizes, place.hardware, place.torus).machine) < devices:
        check_links(sizes, near, place.hardware.platform)
    return sizes


def expert_groups(sizes: Sizes, place: Place) -> tuple[ExpertGroup, ExpertGroup]:
    """(the expert group as the program sees it, as it lies on machines)."""
    shape = sizes["node"], sizes["expert"]
    group = ExpertGroup(shape, "gpu", "")
    physical = physical_group(sizes, place.hardware) if place.hardware else group
    if place.simulated:  # the program is the CPU's, which emulates the ragged exchange
        return ExpertGroup(shape, "cpu", "cpu"), physical
    return mesh_group(sizes, place.hardware) if place.hardware else group, physical
