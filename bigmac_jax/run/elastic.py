"""A run that goes on with fewer replicas than it was started with: a slice is gone, the batch stays."""

from collections.abc import Mapping
from dataclasses import replace

from bigmac_jax.config import Config, ConfigError
from bigmac_jax.model.mesh import REPLICA


def fit_replicas(config: Config, before: Mapping[str, int], devices: int) -> tuple[Config, str]:
    """The config for as many replicas as there are devices for, each as it was, with a batch in more parts so that none
    holds more at a time; and a line that says so, "" where nothing changes.

    Args:
      before: ranks by axis of the mesh that the run was last trained on; {} for a new run, which is left as it is.

    Raises:
      ConfigError: the replicas that are left don't divide the batch.
    """
    mesh, train = config.mesh, config.train
    data = mesh.data or before.get("data", 0)
    ranks = data * mesh.model_ranks  # of a replica
    left = devices // ranks if ranks else 0
    if not before or not 0 < left < mesh.replica or devices % ranks:
        return config, ""
    # The fewest parts of which none is larger than before.
    of_a_replica, rest = divmod(config.data.batch_size, left * data * mesh.expert_ranks)
    largest = config.data.batch_size // (mesh.replica * data * mesh.expert_ranks * train.accumulate_steps)
    parts = next((n for n in range(1, of_a_replica + 1) if of_a_replica % n == 0 and of_a_replica // n <= largest), 0)
    if rest or not parts:
        raise ConfigError(
            f"{left} of mesh.replica={mesh.replica} replicas are here, and data.batch_size={config.data.batch_size} "
            f"does not divide over their {left * data * mesh.expert_ranks} parts; start {_divisor(config, data, left)} "
            f"of them"
        )
    changed = replace(config, mesh=replace(mesh, replica=left, data=data), train=replace(train, accumulate_steps=parts))
    return changed, (
        f"{left} of mesh.{REPLICA}={mesh.replica} replicas are here: the run goes on with them, its batch of "
        f"{config.data.batch_size} in {parts} parts instead of {train.accumulate_steps}"
    )


def _divisor(config: Config, data: int, left: int) -> int:
    """The most replicas, at most `left`, over which the batch divides."""
    shards = data * config.mesh.expert_ranks
    return max(n for n in range(1, left + 1) if config.data.batch_size % (n * shards) == 0)
