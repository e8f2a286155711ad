"""The mesh: axes, order of the devices, and what does not fit."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from bigmac_jax.config import Config, ConfigError, DataConfig, MeshConfig, ModelConfig, TrainConfig
from bigmac_jax.mesh import make_mesh


def config(*mesh: int, batch: int = 16, accumulate: int = 1, length: int = 256, chunks: int = 1) -> Config:
    return Config(
        model=ModelConfig(overlap_chunks=chunks, num_experts=48),
        mesh=MeshConfig(*mesh),
        data=DataConfig(batch_size=batch, sequence_length=length),
        train=TrainConfig(accumulate_steps=accumulate),
    )


@pytest.mark.parametrize(
    ("mesh", "shape"),
    [
        ((1, 1, 1), (1, 1, 1)),
        ((2, 1, 2), (2, 1, 2)),
        ((1, 2, 4), (1, 2, 4)),
        ((0, 1, 1), (8, 1, 1)),  # 0 takes what is left
        ((0, 2, 2), (2, 2, 2)),
        ((0, 1, 8), (1, 1, 8)),
    ],
)
def test_axes(mesh: tuple[int, ...], shape: tuple[int, ...]) -> None:
    made = make_mesh(config(*mesh))
    assert made.axis_names == ("data", "node", "expert")
    assert made.devices.shape == shape
    assert made.axis_types == (AxisType.Explicit,) * 3
    # The expert group is made of neighbours, its node axis outside.
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
