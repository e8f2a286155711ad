"""The mesh: axes, order of the devices, and what does not fit."""

import dataclasses
import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from bigmac_jax.config import Config, ConfigError, DataConfig, ExecutionConfig, MeshConfig, ModelConfig, TrainConfig
from bigmac_jax.model.mesh import (
    AXES,
    HOST,
    axis_sizes,
    batch_spec,
    cache_spec,
    check_host_memory,
    check_links,
    interleave,
    join,
    make_mesh,
    per_replica,
    place,
    rank_spec,
    replicas,
    replicated_spec,
    slices,
    split_spec,
    tensor_ranks,
    token_spec,
)


def config(
    *mesh: int, batch: int = 16, accumulate: int = 1, length: int = 256, chunks: int = 1, heads: int = 4
) -> Config:
    return Config(
        execution=ExecutionConfig(overlap_chunks=chunks),
        model=ModelConfig(vocab_size=8448, num_experts=192, num_heads=heads, hidden_size=16 * heads),
        mesh=MeshConfig(*mesh),
        data=DataConfig(batch_size=batch, sequence_length=length),
        train=TrainConfig(accumulate_steps=accumulate),
    )


@pytest.mark.parametrize(
    ("mesh", "shape"),
    [
        ((1, 1, 1), (1, 1, 1, 1, 1)),
        ((2, 1, 2), (1, 2, 1, 2, 1)),
        ((1, 2, 4), (1, 1, 2, 4, 1)),
        ((0, 1, 1), (1, 8, 1, 1, 1)),  # 0 takes what is left
        ((0, 2, 2), (1, 2, 2, 2, 1)),
        ((0, 1, 8), (1, 1, 1, 8, 1)),
        ((0, 1, 2, 2), (1, 2, 1, 2, 2)),
        ((1, 2, 1, 4), (1, 1, 2, 1, 4)),
    ],
)
def test_axes(mesh: tuple[int, ...], shape: tuple[int, ...]) -> None:
    made = make_mesh(config(*mesh))
    assert made.axis_names == ("replica", "data", "node", "expert", "tensor")
    assert made.devices.shape == shape
    assert made.axis_types == (AxisType.Explicit,) * 5
    # Neighbours share a sequence, then a set of experts, its node axis outside.
    assert [d.id for d in made.devices.flat] == [d.id for d in jax.devices()[: np.prod(shape)]]


@pytest.mark.parametrize(
    ("mesh", "parts"),
    [
        ((4, 1, 4), ("4 × 1 × 4 = 16 ranks", "8 devices", "--cpu_devices=16")),
        ((1, 2, 8), ("1 × 2 × 8 = 16 ranks", "8 devices")),
        ((0, 1, 16), ("1 × 1 × 16 = 16 ranks", "8 devices")),  # not even one replica
    ],
)
def test_more_ranks_than_devices(mesh: tuple[int, ...], parts: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as error:
        make_mesh(config(*mesh))
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


@dataclass(frozen=True)
class Device:
    id: int
    process_index: int
    platform: str = "gpu"
    slice_index: int | None = 0


def shuffled(hosts: int, size: int, process: Callable[[int, int], int] = lambda host, i: host) -> list[Any]:
    """GPUs in the order that a runtime might name them in: not by host."""
    devices = [
        Device(size * host + i, process(host, i), slice_index=host) for host in range(hosts) for i in range(size)
    ]
    return [devices[i] for i in np.random.default_rng(0).permutation(len(devices))]


@pytest.mark.parametrize("sizes", [(1, 4, 8, 1), (2, 2, 4, 2), (4, 1, 8, 1), (1, 4, 2, 4), (2, 4, 2, 2)], ids=str)
def test_experts_and_tensors_stay_inside_a_host(sizes: tuple[int, ...]) -> None:
    made = make_mesh(config(*sizes, batch=64), devices=shuffled(4, 8)).devices
    assert made.shape == (1, *sizes)
    hosts = np.vectorize(lambda device: device.slice_index)(made)[0]
    assert (hosts.reshape(-1, sizes[2] * sizes[3]) == hosts[..., :1, :1].reshape(-1, 1)).all()
    if sizes[0] * sizes[1] == 4:  # then each is a host of its own
        assert sorted(hosts[..., 0, 0].flat) == [0, 1, 2, 3]


def test_a_process_for_every_gpu() -> None:
    """What is near is the host's matter, not the process'."""
    devices = shuffled(2, 4, lambda host, i: 4 * host + i)
    assert [d.id for d in make_mesh(config(1, 2, 4), devices=devices).devices.flat] == list(range(8))
    # Where the runtime doesn't know of hosts, as on CPU, nothing is refused.
    unknown = [Device(i, i, "cpu", None) for i in range(4)]
    assert [d.id for d in make_mesh(config(1, 2, 2), devices=unknown[::-1]).devices.flat] == list(range(4))


def test_a_slice_of_tpus_is_near_whatever_its_hosts() -> None:
    """Two slices of two hosts: `expert` may cross hosts, `node` crosses slices."""
    devices = [Device(i, i // 4, "tpu", i // 8) for i in range(16)]
    slices = np.vectorize(lambda d: d.slice_index)(make_mesh(config(1, 2, 8), devices=devices[::-1]).devices)
    assert (slices == np.array([0, 1]).reshape(1, 1, 2, 1, 1)).all()


def test_an_expert_axis_that_would_cross_hosts() -> None:
    with pytest.raises(ConfigError, match=r"mesh\.expert × mesh\.tensor = 4 × 3 must divide the 8 devices of a host"):
        make_mesh(config(1, 2, 4, 3, batch=64, length=255, heads=3), devices=shuffled(4, 8))
    # Without a node axis a flat group may cross them.
    assert make_mesh(config(1, 1, 16, batch=64), devices=shuffled(2, 8)).devices.shape == (1, 1, 1, 16, 1)


def two_slices(size: int = 8) -> list[Any]:
    """Of TPUs, in an order that a runtime might name them in."""
    devices = [Device(i, i // 4, "tpu", i // size) for i in range(2 * size)]
    return [devices[i] for i in np.random.default_rng(0).permutation(len(devices))]


def on_slices(*mesh: int, replica: int) -> Config:
    return dataclasses.replace(config(*mesh, batch=64), mesh=MeshConfig(*mesh, replica=replica))


def test_replicas_are_slices() -> None:
    """Whatever else a mesh has; replicas may be parts of a slice, too."""
    for mesh, replica in (((2, 1, 4), 2), ((1, 1, 4, 2), 2), ((1, 1, 4), 4), ((1, 1, 8), 2)):
        made = make_mesh(on_slices(*mesh, replica=replica), devices=two_slices())
        assert made.devices.shape[0] == replica
        for devices in made.devices:
            assert len({device.slice_index for device in devices.flat}) == 1
    assert slices(made) == 1 and slices(make_mesh(on_slices(2, 1, 8, replica=1), devices=two_slices())) == 2


def test_what_is_not_for_links_between_slices() -> None:
    rule = r"mesh\.expert × mesh\.tensor = 16 × 1 must divide the 8 devices of a slice, or rows would cross slices; "
    with pytest.raises(
        ConfigError, match=rule + r"use mesh\.expert=8, mesh\.tensor=1, and mesh\.node=2 if they are to"
    ):
        make_mesh(on_slices(1, 1, 16, replica=1), devices=two_slices())
    assert make_mesh(on_slices(1, 2, 8, replica=1), devices=two_slices()).shape["node"] == 2  # which asks for it
    three = [Device(i, i // 4, "tpu", i // 8) for i in range(24)]
    rule = r"mesh\.replica=2 makes replicas of 12 devices, which must be a multiple of the 8 of a slice, or divide "
    with pytest.raises(ConfigError, match=rule + r"them; use mesh\.replica=1 or 3"):
        make_mesh(dataclasses.replace(on_slices(3, 1, 4, replica=2), data=DataConfig(batch_size=96)), devices=three)


def test_devices_left_that_make_no_whole_group() -> None:
    with pytest.raises(
        ConfigError, match=r"the 8 devices must be a multiple of .* = 3, .* use mesh.data=2 to leave 2 idle"
    ):
        make_mesh(config(0, 1, 3, batch=18))


@pytest.mark.parametrize(
    ("made", "parts"),
    [
        (config(0, 1, 1, batch=12), ("batch_size=12", "= 8", "took 8 of 8 devices", "use 16")),
        (config(0, 1, 2, batch=12, accumulate=2), ("batch_size=12", "= 16", "took 4 of 8 devices", "use 16")),
        # All 128 tokens would do, but not the 16 of a rank.
        (config(0, 1, 1, length=8, chunks=32), ("overlap_chunks=32", "16 tokens", "took 8 of 8 devices", "use 16")),
    ],
)
def test_a_batch_that_the_devices_left_do_not_divide(made: Config, parts: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as error:
        make_mesh(made)
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


@dataclass(frozen=True)
class Chip:
    id: int
    process_index: int
    coords: tuple[int, ...]
    platform: str = "tpu"
    slice_index: int = 0


def test_chips_stand_along_the_first_axis_first() -> None:
    """Not by host, which has 2 × 2 × 1 of them: only so XLA sees the rings of a v5p slice."""
    places = [(slice_, x, y, z) for slice_, x, y, z in itertools.product(range(2), range(4), range(4), range(2))]
    chips = [
        Chip(i, 16 * s + x // 2 + 2 * (y // 2) + 4 * z, (x, y, z), slice_index=s)
        for i, (s, x, y, z) in enumerate(places)
    ]
    given: list[Any] = [chips[i] for i in np.random.default_rng(0).permutation(len(chips))]
    made = make_mesh(config(2, 2, 16, batch=64), devices=given).devices.flat
    assert [(chip.slice_index, *chip.coords[::-1]) for chip in made] == [
        (s, z, y, x) for s, z, y, x in itertools.product(range(2), range(2), range(4), range(4))
    ]


@pytest.mark.parametrize(
    ("platform", "sizes", "size", "refused"),
    [
        # Nodes cross hosts, and what is inside a node must not.
        ("gpu", (1, 1, 2, 8, 1), 8, ""),
        ("gpu", (1, 1, 2, 2, 2), 8, ""),
        ("gpu", (1, 1, 2, 4, 3), 8, "4 × 3 must divide the 8 devices .* mesh.node=2 .*expert=4, mesh.tensor=1"),
        ("gpu", (1, 1, 2, 8, 2), 8, "8 × 2 must divide the 8 devices of a host, .* use mesh.expert=4, mesh.tensor=2"),
        ("gpu", (1, 1, 1, 16, 1), 8, ""),
        # A TPU's rows do not cross slices unless mesh.node asks for it.
        ("tpu", (1, 2, 1, 8, 1), 8, ""),
        ("tpu", (1, 1, 1, 8, 2), 8, "rows would cross slices; use mesh.expert=4, mesh.tensor=2, and mesh.node=2 if"),
        ("tpu", (1, 1, 1, 6, 2), 8, "rows would cross slices; use mesh.expert=2, mesh.tensor=2, and mesh.node=3 if"),
        # Replicas are several slices, one, or a part of one; one alone is whatever it is.
        ("tpu", (2, 2, 1, 8, 1), 8, ""),
        ("tpu", (2, 1, 1, 8, 1), 8, ""),
        ("tpu", (4, 1, 1, 4, 1), 8, ""),
        ("tpu", (1, 3, 1, 4, 1), 8, ""),
        ("tpu", (2, 3, 1, 4, 1), 8, "mesh.replica=2 makes replicas of 12 .* the 8 of a slice, .* mesh.replica=1 or 3"),
        ("gpu", (3, 6, 1, 1, 1), 4, "mesh.replica=3 makes replicas of 6 .* 4 of a host, .* use mesh.replica=2 or 4"),
        ("gpu", (3, 3, 1, 1, 1), 8, "mesh.replica=3 makes replicas of 3 .* the 8 of a host, .* use mesh.replica=1$"),
        ("gpu", (2, 3, 1, 1, 1), 8, ""),  # all on the first host
    ],
)  # fmt: skip
def test_what_may_cross_hosts_and_slices(platform: str, sizes: tuple[int, ...], size: int, refused: str) -> None:
    given = dict(zip(AXES, sizes, strict=True))
    if refused:
        with pytest.raises(ConfigError, match=re.sub(r"mesh\.", r"mesh\\.", refused)):
            check_links(given, size, platform)
    else:
        check_links(given, size, platform)


def test_gpus_without_slices_are_near_on_their_host() -> None:
    """Where a process has several GPUs, these are a host, and the order is by process; where each has a process of its
    own, nobody knows of hosts, and nothing is refused. One host alone has no links to others."""
    near = [Device(i, i // 4, "gpu", None) for i in range(8)]
    made = make_mesh(config(1, 2, 4), devices=[near[i] for i in (5, 0, 7, 2, 4, 1, 6, 3)]).devices
    assert [[d.process_index for d in node.flat] for node in made[0, 0]] == [[0] * 4, [1] * 4]
    with pytest.raises(ConfigError, match=r"= 3 × 1 must divide the 4 devices of a host"):
        make_mesh(config(1, 2, 3, batch=18), devices=near)
    for hosts in (range(8), [0] * 8):
        alone = [Device(i, host, "gpu", None) for i, host in enumerate(hosts)]
        made = make_mesh(config(1, 2, 3, batch=18), devices=alone[::-1])
        assert made.devices.shape == (1, 1, 2, 3, 1) and slices(made) == 1
    unequal = [Device(i, 0, "gpu", int(i > 4)) for i in range(8)]  # of 5 and 3: what divides both is near
    with pytest.raises(ConfigError, match=r"= 2 × 1 must divide the 1 devices of a host"):
        make_mesh(config(1, 2, 2), devices=unequal)


def test_gpus_of_several_hosts_are_no_slices() -> None:
    assert slices(make_mesh(config(1, 2, 8), devices=shuffled(2, 8))) == 1


def test_the_largest_mesh_and_one_that_leaves_devices() -> None:
    """With mesh.data=0 all devices, else at most those; that they divide the batch is for training alone."""
    given = config(0, 2, 2, batch=12)
    assert axis_sizes(given, 8, fit_batch=False) == {"replica": 1, "data": 2, "node": 2, "expert": 2, "tensor": 1}
    assert make_mesh(given, fit_batch=False).devices.shape == (1, 2, 2, 2, 1)
    assert axis_sizes(config(3, 1, 2, batch=18), 6)["data"] == 3
    assert make_mesh(config(3, 1, 2, batch=18)).devices.shape == (1, 3, 1, 2, 1)
    with pytest.raises(ConfigError, match=r"3 × 1 × 2 = 6 ranks must be at most the 5 devices"):
        axis_sizes(config(3, 1, 2, batch=18), 5)


def test_a_spec_has_an_entry_for_every_dimension() -> None:
    """The batch over all axes but `tensor`, which splits the sequence, features or heads; what is of ranks over all."""
    batch = AXES[:-1]
    for ndim in (3, 4, 5):
        whole = (None,) * (ndim - 3)
        assert token_spec(ndim) == P(batch, "tensor", None, *whole)
        assert split_spec(ndim) == P(batch, None, "tensor", *whole)
        assert batch_spec(ndim) == P(batch, None, None, *whole) and rank_spec(ndim) == P(AXES, None, None, *whole)
        assert replicated_spec(ndim) == P(None, None, None, *whole)
    assert cache_spec() == P("tensor", batch, None, None)


def test_rows_of_stacks_stand_behind_each_other_or_in_turn() -> None:
    """And so go gradients back to them."""
    first, second, third = np.arange(18, dtype=np.float32).reshape(3, 3, 2)
    with jax.set_mesh(make_mesh(config(1, 1, 1))):
        for together, rows, expected in (
            (join, (first, second[:1], third[:2]), np.concatenate([first, second[:1], third[:2]])),
            (interleave, (first, second, third), np.stack([first, second, third], axis=1).reshape(9, 2)),
        ):
            whole, pull = jax.vjp(together, *(place(row, replicated_spec(2)) for row in rows))
            np.testing.assert_array_equal(whole, expected)
            for row, gradient in zip(rows, pull(whole), strict=True):
                np.testing.assert_array_equal(gradient, row)


def test_replicas_without_a_mesh_and_on_one() -> None:
    """One, which has all; of two each has its half of the batch, split over the other axes of it."""
    v = np.arange(24.0, dtype=np.float32).reshape(8, 3)
    assert (replicas(), tensor_ranks()) == (1, 1) and per_replica(jnp.asarray(v)).shape == (1, 8, 3)
    made = make_mesh(dataclasses.replace(config(2, 1, 1, 2), mesh=MeshConfig(2, 1, 1, 2, replica=2)))
    with jax.set_mesh(made):
        split = per_replica(place(v, P(("replica", "data"), None)))
        assert (replicas(), tensor_ranks()) == (2, 2)
        np.testing.assert_array_equal(split, v.reshape(2, 4, 3))
        assert jax.typeof(split).sharding.spec == P("replica", ("data",), None)


@dataclass(frozen=True)
class Memory:
    kind: str


@dataclass(frozen=True)
class Remembering(Device):
    kinds: tuple[str, ...] | None = ()
    device_kind: str = "Abacus"

    def addressable_memories(self) -> list[Memory]:
        if self.kinds is None:
            raise jax.errors.JaxRuntimeError("of a chip that is only compiled for")
        return [Memory(kind) for kind in self.kinds]


@pytest.mark.parametrize(
    ("kinds", "told"), [(("device", HOST), ""), ((HOST,), ""), (None, ""), ((), ""), (("device", "far"), "device, far")]
)
def test_host_memory_that_a_device_does_not_reach(kinds: tuple[str, ...] | None, told: str) -> None:
    made = make_mesh(config(1, 1, 1), devices=[Remembering(0, 0, kinds=kinds)])  # type: ignore[list-item]
    if not told:
        check_host_memory(made, "offload=True", "offload=False")
    else:
        with pytest.raises(ConfigError) as error:
            check_host_memory(made, "offload=True", "offload=False")
        assert str(error.value) == f"offload=True needs {HOST} memory, and Abacus has {told} alone; use offload=False"
