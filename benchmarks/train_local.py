"""train.py without its exchange: python -m benchmarks.train_local, then train.py's arguments; run from the repository.

The rows of the MoE layers stay on their rank (`benchmarks.local`); gradients are summed over the ranks as ever. For the
time of a step, not for what it learns.
"""

from bigmac_jax.runtime import environment

environment.prepare()

from benchmarks.local import local_exchange  # noqa: E402
from bigmac_jax.commands import cli, train  # noqa: E402

if __name__ == "__main__":
    with local_exchange():
        cli.run(train.main, distributed=True)
