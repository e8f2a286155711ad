"""The flags of drafts, which generate.py and serve.py share."""

from collections.abc import Callable

from absl import flags

from bigmac_jax.inference.drafter import STAND_INS, Speculation


def define(module: str) -> Callable[[], Speculation]:
    """Defines the flags as those of a command's module → what they say, once they are parsed; that raises ConfigError
    for a value out of its range."""
    tokens = flags.DEFINE_integer(
        "speculate", 0, "Tokens that are drafted by what each rank holds, and verified at once; 0 drafts none.",
        module_name=module,
    )  # fmt: skip
    local = flags.DEFINE_integer(
        "local_experts", 0, "Of each rank, that drafts use; 0 = all that it holds. Fewer are for study.",
        module_name=module,
    )  # fmt: skip
    stand_ins = flags.DEFINE_enum(
        "stand_ins", Speculation.stand_ins, STAND_INS, "What a draft computes for an expert that is elsewhere.",
        module_name=module,
    )  # fmt: skip
    least = flags.DEFINE_float(
        "least_acceptance", Speculation.least, "Drafts pause while a smaller share of their tokens is accepted.",
        module_name=module,
    )  # fmt: skip
    return lambda: Speculation(tokens.value, local.value, stand_ins.value, least.value)
