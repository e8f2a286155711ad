"""How the ranks of a mesh lie on a machine, and the seconds that collectives take on its links; none is measured.

A collective takes α + bytes / β: α for each message, β of the link that is filled first.
"""

import math
from dataclasses import dataclass

from bigmac_jax.config import ConfigError
from bigmac_jax.model.counts import Sizes
from bigmac_jax.model.exchange.costs import Sent
from bigmac_jax.model.mesh import ExpertGroup
from bigmac_jax.planning.hardware import Hardware
from bigmac_jax.planning.hardware.torus import Block, Shape, parts


@dataclass(frozen=True)
class Cluster:
    """The ranks of a mesh on a machine."""

    hardware: Hardware
    sizes: Sizes  # ranks along each axis of the mesh
    slice: Block | None = None  # on a torus, the chips that ICI joins

    @property
    def ranks(self) -> int:
        """Number of all ranks."""
        return math.prod(self.sizes.values())

    @property
    def replicas(self) -> int:
        """Number of replicas of the parameters."""
        return self.sizes.get("replica", 1)

    @property
    def inside(self) -> int:
        """Number of ranks of a replica."""
        return self.ranks // self.replicas

    @property
    def group(self) -> int:
        """Number of ranks that share one set of experts."""
        return self.sizes["node"] * self.sizes["expert"]

    @property
    def tensor(self) -> int:
        """Number of ranks that share a sequence; they are neighbours, and each is in an expert group of its own."""
        return self.sizes.get("tensor", 1)

    @property
    def machine(self) -> int:
        """Number of ranks that fast links join."""
        return self.slice.chips if self.slice else self.hardware.ranks_together(self.ranks)

    @property
    def near(self) -> int:
        """Number of ranks of one machine that may be in one expert group."""
        return max(1, self.machine // self.tensor)

    def by_link(self, sent: Sent) -> Sent:
        """Splits what is sent along the axes expert (`sent.fast`) and node (`sent.slow`) into fast and slow links.

        Along an axis every peer gets as much, so it is enough to know how many of them are in the machine.
        """
        node, expert = self.sizes["node"], self.sizes["expert"]
        inside = math.gcd(self.group, self.near)
        if inside % expert:  # a machine that cuts through the mesh's rows keeps at least this much of one
            inside = math.gcd(inside, expert)
        if inside >= expert:
            near = sent.slow * (inside / expert - 1) / (node - 1) if node > 1 else 0.0
            return Sent(sent.fast + near, sent.slow - near)
        near = sent.fast * (inside - 1) / (expert - 1)
        return Sent(near, sent.fast - near + sent.slow)

    def exchange(self, sent: Sent, exchanges: int, hierarchical: bool = False) -> float:
        """Seconds of so many exchanges; a rank sends `sent.fast` bytes along expert and `sent.slow` along node in all.

        A flat exchange fills fast and slow links side by side, so the longer one counts. The two hops of a hierarchical
        one follow each other.
        """
        node, expert = self.sizes["node"], self.sizes["expert"]
        if self.slice and self.group <= self.near:
            group = parts(parts(self.slice, self.tensor)[1], self.group)[0]
            if not hierarchical:
                return self._across(group, sum(sent), exchanges)
            inside, between = parts(group, expert)
            return self._across(inside, sent.fast, exchanges) + self._across(between, sent.slow, exchanges)
        messages = Sent(expert - 1, node - 1 if hierarchical else (node - 1) * expert).times(exchanges)
        (fast, slow), (fast_messages, slow_messages) = self.by_link(sent), self.by_link(messages)
        h = self.hardware
        across = slow_messages * h.slow.latency + slow / h.slow.bandwidth
        if self.slice:
            inside = parts(parts(self.slice, self.tensor)[1], math.gcd(self.group, self.near))[0]
            near = self._across(inside, fast, exchanges)
        else:
            near = fast_messages * h.fast.latency + fast / h.fast.bandwidth
        return near + across if hierarchical else max(near, across)

    def _across(self, block: Block, sent: float, exchanges: int) -> float:
        """Seconds of exchanges in which every chip of the block sends `sent` bytes to the others."""
        if block.chips == 1:
            return 0.0
        link = self.hardware.fast
        return exchanges * block.hops() * link.latency + block.busiest_link() * sent / link.bandwidth

    def around(self, sent: float, ranks: int, stride: int = 1) -> float:
        """Seconds of a ring in which each of `ranks`, every `stride`-th of the mesh, sends `sent` bytes to the next.

        Between machines a ring leaves each of them once, so it has the share of all its ranks there to itself.
        """
        if ranks == 1:
            return 0.0
        h, inside = self.hardware, max(1, min(ranks, self.machine // stride))
        rate = math.inf
        if inside > 1:
            rate = h.fast.bandwidth * (self._ring(inside, stride) if self.slice else 1)
        if ranks > inside:
            rate = min(rate, h.slow.bandwidth * inside)
        return sent / rate

    def _ring(self, ranks: int, stride: int) -> float:
        """Links on which so many chips, every `stride`-th of the slice, send around: those of their own block. Chips
        that make none go along a line."""
        assert self.slice is not None
        return parts(parts(self.slice, stride)[1], ranks)[0].ring_links() or 1.0

    def all_reduce(self, size: float, ranks: int, stride: int = 1) -> float:
        """Seconds of summing `size` bytes over `ranks`, every `stride`-th of the mesh: scattered, then gathered."""
        return self.around(2 * size * (ranks - 1) / ranks, ranks, stride)


def cluster(sizes: Sizes, hardware: Hardware, topology: Shape | None = None) -> Cluster:
    """Lays the ranks of a mesh on a machine; on a torus on slices of `topology`, by default nearly square ones.

    Raises:
      ConfigError: a topology that this machine doesn't have, or that the ranks or their groups don't fill.
    """
    if hardware.torus is None:
        if topology:
            raise ConfigError(f"topology={_x(topology)} is of a TPU, not of {hardware.device_kind}; leave it out")
        return Cluster(hardware, sizes)
    ranks, group = math.prod(sizes.values()), sizes["node"] * sizes["expert"] * sizes.get("tensor", 1)
    shape = topology or hardware.torus.near_cube(hardware.ranks_together(ranks))
    if len(shape) > hardware.torus.dimensions or min(shape) < 1:
        raise ConfigError(f"topology={_x(shape)} must have at most {hardware.torus.dimensions} axes, each at least 1")
    whole = hardware.torus.slice(shape)
    chips = whole.chips  # or cores, which are ranks, too
    if chips > hardware.machine_ranks:
        most = hardware.machine_ranks // hardware.cores
        raise ConfigError(f"topology={_x(shape)} must have at most the {most} chips of a slice")
    if ranks % chips:
        of = "chips" if hardware.cores == 1 else "cores"
        raise ConfigError(f"the {ranks} ranks must be a multiple of the {chips} {of} of topology={_x(shape)}")
    inside = math.gcd(group, chips)
    if inside != min(group, chips) or parts(whole, inside)[0].chips != inside:
        names = "mesh.node × mesh.expert" + " × mesh.tensor" * (sizes.get("tensor", 1) > 1)
        raise ConfigError(f"{names} = {group} ranks must make a block of topology={_x(shape)}")
    return Cluster(hardware, sizes, whole)


def _x(shape: Shape) -> str:
    return "x".join(map(str, shape))


def physical_group(sizes: Sizes, hardware: Hardware) -> ExpertGroup:
    """The expert group as it lies on machines: mesh.expert = 32 on machines of 8 is 4 × 8.

    Only a hierarchical exchange depends on what the mesh itself says.
    """
    group = sizes["node"] * sizes["expert"]
    inside = math.gcd(group, max(1, hardware.machine_ranks // sizes.get("tensor", 1)))
    return ExpertGroup((group // inside, inside), hardware.platform, hardware.device_kind)


def mesh_group(sizes: Sizes, hardware: Hardware) -> ExpertGroup:
    """The expert group as the mesh has it, which is what the program sees."""
    return ExpertGroup((sizes["node"], sizes["expert"]), hardware.platform, hardware.device_kind)
