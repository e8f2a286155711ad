"""What a model has learned, in a run and before it, in words. run.json keeps what was before the run."""

import pathlib

from bigmac_jax.config import Config
from bigmac_jax.config.mixture import parse_mixture
from bigmac_jax.model.counts import adapted_parts
from bigmac_jax.training.workdir import read_history

_UNKNOWN = "what came before is not recorded"


def model_name(place: str | pathlib.Path) -> str:
    """What a model is called that lies at a place: its folder, or in the hub's cache its repository."""
    path = pathlib.Path(place)
    if path.parent.name == "checkpoints":
        path = path.parent.parent
    if path.parent.name == "snapshots":
        return path.parent.parent.name.removeprefix("models--").replace("--", "/", 1)
    return path.name


def describe_training(config: Config, step: int) -> str:
    """What a run has learned from after some steps, and which parameters did."""
    data, tuning, train = config.data, config.tuning, config.train
    source = data.source if ":" in data.source else pathlib.Path(data.source).name
    if parts := parse_mixture(data.mixture):
        source = f"a mixture: {', '.join(part.name for part in parts)}"
    what = {
        "pretrain": f"{step * data.batch_size * data.sequence_length:,} tokens of {source}",
        "sft": f"the answers of {source} (supervised fine-tuning)",
        "dpo": f"the preferences of {source} (DPO, beta {tuning.dpo_beta:g})",
    }[tuning.objective]
    if tuning.teacher:
        what += (
            f", with the predictions of `{model_name(tuning.teacher)}` (distillation, weight {tuning.teacher_weight:g})"
        )
    if tuning.lora_rank:
        targets = ", ".join(adapted_parts(config))
        what += f"; adapters (LoRA) of rank {tuning.lora_rank}, alpha {tuning.lora_alpha:g}, on {targets}"
    elif train.init_from:
        trained = tuning.train_router and config.model.router != "frozen"
        what += "; all parameters" + ("" if trained or not config.model.is_moe else " but the router")
    return f"{step:,} steps on {what}"


def history_before(workdir: pathlib.Path, config: Config) -> list[str]:
    """What the model had learned before the run of a workdir, in order; [] if it began with random parameters."""
    known = read_history(workdir)
    if known is not None:
        return known
    return [_UNKNOWN] + ([f"`{model_name(config.train.init_from)}`"] if config.train.init_from else [])


def history_with(workdir: pathlib.Path, config: Config, step: int) -> list[str]:
    """As `history_before`, and what the run itself has learned after some steps."""
    own = f"`{model_name(workdir)}`: {describe_training(config, step)}"
    return history_before(workdir, config) + ([own] if step else [])
