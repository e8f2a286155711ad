"""AdamW with warm-up, cosine decay, clipping and a decay mask, from Optax."""

from typing import Any

import optax

from bigmac_jax.config import Config
from bigmac_jax.model.parameters import map_declared


def learning_rate(config: Config) -> optax.Schedule:
    """By steps done: learning_rate / (warmup_steps + 1) at first, learning_rate after the warm-up, then a cosine to
    final_learning_rate, which it keeps."""
    optimizer = config.optimizer
    decay = optimizer.decay_steps or max(1, config.train.steps - optimizer.warmup_steps)
    return optax.schedules.warmup_cosine_decay_schedule(
        init_value=optimizer.learning_rate / (optimizer.warmup_steps + 1),  # a first step at 0 would be lost
        peak_value=optimizer.learning_rate,
        warmup_steps=optimizer.warmup_steps,
        decay_steps=optimizer.warmup_steps + decay,
        end_value=optimizer.final_learning_rate,
    )


def decay_mask(params: Any) -> Any:
    """True for the parameters that say they decay."""
    return map_declared(lambda declaration, _: declaration.decays, params)


def make_optimizer(config: Config) -> optax.GradientTransformation:
    optimizer = config.optimizer
    adamw = optax.adamw(
        learning_rate(config),
        b1=optimizer.b1,
        b2=optimizer.b2,
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        mask=decay_mask,
    )
    return optax.chain(optax.clip_by_global_norm(optimizer.clip_norm), adamw) if optimizer.clip_norm else adamw
