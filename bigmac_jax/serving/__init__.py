"""A server with OpenAI's interface around the engine of `bigmac_jax.inference`."""
