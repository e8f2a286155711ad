"""Says what a configuration costs before it runs: python plan.py --config=PATH (docs/planning.md)."""

from bigmac_jax.commands import start

if __name__ == "__main__":
    start("plan")
