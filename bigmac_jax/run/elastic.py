"""A run that goes on with fewer replicas than it was started with: a slice is gone, the batch stays."""

from collections.abc import Mapping
from dataclasses import replace

from bigmac_jax.config import Config, ConfigError
from bigmac_jax.model.mesh import REPLICA


def fit_replicas(config: Config, saved: Config | None, mesh: Mapping[str, int], devices: int) -> tuple[Config, str]:
    """The config for as many replicas as there are devices for, each as it was, with a batch in more parts so that none
    has more sequences at a time; and a line that says so, "" where nothing changes.

    Args:
      saved: what the run was asked for before; None for a new run, which is left as it is, and so is one that is asked
        for another number of replicas now.
      mesh: ranks by axis of the mesh that it was last trained on.

    Raises:
      ConfigError: the replicas that are left don't divide the batch.
    """
    asked, batch, before = config.mesh, config.data.batch_size, config.train.accumulate_steps
    data = asked.data or mesh.get("data", 0)
    same = all(mesh.get(axis) == getattr(asked, axis) for axis in ("node", "expert", "tensor"))
    if saved is None or saved.mesh.replica != asked.replica or not (same and data):
        return config, ""
    ranks, shards = data * asked.model_ranks, data * asked.expert_ranks  # of a replica; that its batch is split over
    left = devices // ranks
    if not 0 < left < asked.replica or devices % ranks or batch % (shards * asked.replica * before):
        return config, ""
    if batch % (left * shards):
        start = max(n for n in range(1, left + 1) if batch % (n * shards) == 0)
        raise ConfigError(
            f"{left} of mesh.{REPLICA}={asked.replica} replicas are here, whose {left * shards} shards do not divide "
            f"data.batch_size={batch}; start {start} of them"
        )
    rows, most = batch // (left * shards), batch // (asked.replica * shards * before)
    parts = next(n for n in range(1, rows + 1) if rows % n == 0 and rows // n <= most)
    mesh_left = replace(asked, replica=left, data=data)
    fitted = replace(config, mesh=mesh_left, train=replace(config.train, accumulate_steps=parts))
    return fitted, (
        f"{left} of mesh.{REPLICA}={asked.replica} replicas are here: the run goes on with them, its batch of {batch} "
        f"in {parts} parts instead of {before}"
    )
