"""Lists the config's fields with their defaults, meaning and choices: bigmac fields [GROUP | GROUP.FIELD …]."""

from bigmac_jax import cli
from bigmac_jax.config import reference


def main() -> None:
    print(reference.describe(cli.ARGUMENTS))


def run() -> None:
    cli.run(main, arguments=True)
