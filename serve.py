"""Serves a trained model over HTTP: python serve.py --workdir=DIR --port=8000 (docs/serving.md)."""

from bigmac_jax.commands import start

if __name__ == "__main__":
    start("serve")
