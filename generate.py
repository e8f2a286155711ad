"""Completes prompts with a trained model: python generate.py --workdir=DIR --prompt=TEXT (docs/inference.md)."""

from bigmac_jax.commands import start

if __name__ == "__main__":
    start("generate")
