"""python -m bigmac_jax.data … is `bigmac data …`."""

from bigmac_jax.commands import start

if __name__ == "__main__":
    start("data")
