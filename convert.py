"""Models to and from Hugging Face: python convert.py export|import (docs/interchange.md)."""

from bigmac_jax.commands import start

if __name__ == "__main__":
    start("convert")
