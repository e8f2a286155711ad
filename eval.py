"""Scores a trained model: python eval.py --workdir=DIR (docs/evaluation.md)."""

from bigmac_jax.commands import start

if __name__ == "__main__":
    start("eval")
