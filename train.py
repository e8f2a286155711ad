"""Trains a model: python train.py --config=tiny --workdir=DIR (docs/training.md)."""

from bigmac_jax.commands import start

if __name__ == "__main__":
    start("train")
