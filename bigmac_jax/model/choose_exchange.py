"""Which exchange a config gets on a mesh."""

import math

from bigmac_jax.config import Config
from bigmac_jax.model.exchange import STRATEGIES, Local, Strategy
from bigmac_jax.model.exchange.costs import seconds
from bigmac_jax.model.mesh import EXPERT_GROUP, ExpertGroup, current_group


def choose_exchange(config: Config, capacity_factor: float, tokens: int, group: ExpertGroup | None = None) -> Strategy:
    """The exchange of `config` for `tokens` of a rank at a time, by default in the current mesh's group."""
    group = group or current_group()
    name: str = config.execution.exchange
    if name == "auto":
        predicted = predict_seconds(config, capacity_factor, tokens, group)
        name = min(predicted, key=predicted.__getitem__)
    return make_exchange(name, config, capacity_factor, group)


def make_exchange(name: str, config: Config, capacity_factor: float, group: ExpertGroup) -> Strategy:
    """The strategy `name` of `exchange.STRATEGIES` with the config's formats and room."""
    execution = config.execution
    forward = execution.wire_dtype or execution.dtype
    return STRATEGIES[name](
        config.model.expert_count,
        group.sizes,
        capacity_factor,
        EXPERT_GROUP,
        forward,
        execution.wire_dtype_backward or forward,
        buffer_factor=execution.room_factor,
    )


def make_local(config: Config, computed: int) -> Local:
    """The strategy of a draft model, which exchanges nothing and computes `computed` experts of each rank."""
    return Local(config.model.expert_count, current_group().sizes, math.inf, EXPERT_GROUP, computed=computed)


def available_exchanges(device_kind: str) -> list[str]:
    """The strategies that devices of a kind have: v5e has no ragged exchange over a group of 32 ("limited ICI")."""
    return [name for name in STRATEGIES if name != "ragged" or device_kind != "TPU v5 lite"]


def predict_seconds(
    config: Config, capacity_factor: float, tokens: int, group: ExpertGroup | None = None
) -> dict[str, float]:
    """Predicted seconds of each strategy's exchanges in a forward pass of one layer; `auto` takes the smallest."""
    group, m = group or current_group(), config.model
    # The emulation of the ragged exchange on CPU is there to be tested.
    names = [name for name in available_exchanges(group.device_kind) if name != "ragged" or group.platform != "cpu"]
    if config.execution.asks_for_rounds:
        names = [name for name in names if STRATEGIES[name].takes_rounds]
    exchanges = {name: make_exchange(name, config, capacity_factor, group) for name in names}
    if math.isfinite(capacity_factor):  # others would not read it
        exchanges = {
            name: exchange
            for name, exchange in exchanges.items()
            if not exchange.dropless and (exchange.moves_choices or m.overflow == "drop")
        }
    return {name: seconds(exchange, tokens, m.choices, m.wire_size) for name, exchange in exchanges.items()}
