"""A server with OpenAI's HTTP interface around the engine of `bigmac_jax.inference`."""
