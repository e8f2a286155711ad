"""How many experts a token is sent to over the steps (train.choices_from): an early router is sent to fewer."""

import jax.numpy as jnp
from jax import Array

from bigmac_jax.config import Config


def choices_at(config: Config, done: Array) -> Array | None:
    """The choices of a token in the step after `done` ones; None where they are always model.top_k.

    The first choices_steps steps are divided evenly among choices_from, choices_from + 1, …, top_k. The number is a
    function of the step alone, so that a resumed run goes on with it, and no program is compiled for each.
    """
    first, most, steps = config.train.choices_from, config.model.choices, config.train.choices_steps
    if not config.grows_choices:
        return None
    return jnp.minimum(most, first + done * (most - first + 1) // steps)
