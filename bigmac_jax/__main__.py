"""python -m bigmac_jax NAME … is `bigmac NAME …`."""

from bigmac_jax.commands import main

if __name__ == "__main__":
    main()
