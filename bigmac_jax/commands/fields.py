"""Lists the config's fields with their defaults, meaning and choices: bigmac fields [GROUP | GROUP.FIELD …]."""

from bigmac_jax.commands import cli
from bigmac_jax.config import field_docs


def main() -> None:
    print(field_docs.describe(cli.ARGUMENTS))
