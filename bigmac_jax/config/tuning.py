"""`tuning`: what a trained model learns next, and which parameters are trained."""

from dataclasses import dataclass
from typing import Literal

from bigmac_jax.config.errors import require
from bigmac_jax.config.names import ask
from bigmac_jax.config.places import check_place
from bigmac_jax.config.section import Amount, Section, Share, Size

# Parts of the model that adapters can stand on, as their parameters declare them.
LORA_TARGETS = ("attention", "projections", "shared", "experts", "mlp", "mamba", "router")


@dataclass(frozen=True)
class TuningConfig(Section):
    """Fine-tuning: what a trained model learns from, and which of its parameters are trained (docs/finetune.md)."""

    # pretrain: all of a text. sft: answers alone. dpo: answers against worse ones.
    objective: Literal["pretrain", "sft", "dpo"] = "pretrain"
    chat_template: str = ""  # a Jinja file, or its folder; "" = beside the tokenizer, else the model's, else ours
    bad_rows: Literal["stop", "skip"] = "stop"  # skip leaves them out, and says how many for what reason
    train_router: bool = True  # false: which experts a token goes to is decided as before
    lora_rank: Size = 0  # of the adapters (LoRA) that are trained instead of the model; 0 = the model itself
    lora_alpha: Amount = 16.0  # adapters are multiplied by it / lora_rank
    lora_dropout: Share = 0.0  # of inputs of the adapters; all tokens of a part of a batch lose the same ones
    lora_targets: str = "attention,projections,shared,experts"  # parts that get them; mlp, mamba, router, too, if named
    teacher: str = ""  # a model to learn from besides the text: a workdir, an export or a folder; "" = none
    # Weight of the divergence from its predictions in the loss; the text's loss has the rest.
    teacher_weight: Amount = 0.5
    hidden_weight: Amount = 0.0  # of the distance from its layers' outputs, which must be of the same width
    dpo_beta: Amount = 0.1  # how hard DPO holds on to the model that it began with

    @property
    def frozen_router(self) -> str:
        """The setting that leaves the router as it is, or ""."""
        if self.lora_rank:
            return f"tuning.lora_rank={self.lora_rank}"
        return "" if self.train_router else "tuning.train_router=false"

    def check(self) -> None:
        check_place(self.teacher, "tuning.teacher")
        require(self.teacher_weight <= 1, f"tuning.teacher_weight={self.teacher_weight:g} must be at most 1")
        require(not self.teacher or self.objective != "dpo", "tuning.teacher is of a text or of answers, and tuning.objective=dpo has its own reference; drop one of them")  # fmt: skip
        require(self.objective != "dpo" or self.dpo_beta > 0, f"tuning.dpo_beta={self.dpo_beta:g} must be above 0; 0.1 is usual")  # fmt: skip
        if self.lora_rank:
            require(self.lora_alpha > 0, f"tuning.lora_alpha={self.lora_alpha:g} must be above 0; {self.lora_rank} adds the adapters as they are")  # fmt: skip
            targets = self.lora_targets.split(",")
            asked = next((ask(target, LORA_TARGETS) for target in targets if target not in LORA_TARGETS), "")
            require(set(targets) <= set(LORA_TARGETS), f"tuning.lora_targets={self.lora_targets} must be some of {', '.join(LORA_TARGETS)}, with commas between{asked}")  # fmt: skip
            require(self.train_router or "router" not in targets, "tuning.lora_targets names the router, and tuning.train_router=false leaves it alone; drop one of them")  # fmt: skip
