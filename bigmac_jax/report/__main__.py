"""python -m bigmac_jax.report … is `bigmac report …`."""

from bigmac_jax.commands import start

if __name__ == "__main__":
    start("report")
