"""python -m bigmac_jax.selfcheck … is `bigmac selfcheck …`."""

from bigmac_jax.commands import start

if __name__ == "__main__":
    start("selfcheck")
