"""Which fields a resumed run may change, and how its result then differs."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from bigmac_jax.config.errors import require
from bigmac_jax.config.reads import unread_for
from bigmac_jax.config.root import Config
from bigmac_jax.config.section import flat_values

# How it is executed, periodic actions, and where its data lies, as long as that is the same
# (docs/training.md, "Resuming"; `training.run_data.check_data`).
MAY_CHANGE = ("execution.", "mesh.", "train.steps", "train.accumulate_steps", "train.log_every", "train.eval_every",
              "train.checkpoint_every", "train.keep_checkpoints", "train.experts_per_checkpoint",
              "train.partial_checkpoint", "train.most_lost_updates", "train.on_bad_step", "train.max_bad_steps",
              "train.spike_factor", "train.wandb", "train.tasks", "tuning.chat_template", "data.source",
              "data.validation_source", "data.test_source", "data.mixture", "data.curriculum", "data.tokenizer",
              "data.num_workers", "cache_dir")  # fmt: skip
# How far a step goes; a line says what has changed (`training.optimizer.optimizer_notes`).
RATES_MAY_CHANGE = ("optimizer.learning_rate", "optimizer.final_learning_rate", "optimizer.schedule",
                    "optimizer.warmup_steps", "optimizer.decay_steps", "optimizer.weight_decay")  # fmt: skip
# May change, but not be left out nor added. Models may be moved; that they are the same is checked where they are
# opened (`tuning.pretrained`). Of clipping the optimizer's state has a part.
_IF_SET = ("train.init_from", "tuning.teacher", "optimizer.clip_norm")
# What decides which choices stand in one line for an expert's room.
_LINES = (
    *(f"mesh.{axis}" for axis in ("replica", "data", "node", "expert", "tensor")),
    *("execution.exchange", "execution.overlap_chunks", "train.accumulate_steps"),
)


def check_resume(saved: Config, new: Config) -> None:
    """Raises ConfigError if `new` differs from `saved` in a field that would change the result of the run."""
    before, after = flat_values(saved.resolved), flat_values(new.resolved)
    for values, config in ((before, saved), (after, new)):
        values["model.context_length"] = config.context_length
    # W↓ and W↑ are bigmac's alone; but the optimizer's state has a part of optimizer.projection_rate in any structure.
    bigmac = "bigmac" in (saved.model.structure, new.model.structure)
    unread: tuple[str, ...] = () if bigmac else ("model.projection_init",)
    # A whole batch is a step and its own part: only where there are parts before and now does the scope have to stay.
    if any(unread_for(config, "model.balance_scope") for config in (saved, new)):
        unread += ("model.balance_scope",)
    declared = () if new.model.positions == "learned" else ("model.context_length",)  # which exports alone read
    for name, value in after.items():
        may = name.startswith((*MAY_CHANGE, *RATES_MAY_CHANGE, *unread, *declared)) or (
            name in _IF_SET and before[name] and value
        )
        require(before[name] == value or may, f"{name}={value!r} differs from {before[name]!r}, which this workdir was started with; keep {before[name]!r}, or use a new --workdir{'' if name.startswith('model.') else ', with --config.train.init_from=THIS to begin with the model of this one'}")  # fmt: skip


def resume_notes(saved: Config, new: Config, mesh_before: dict[str, int], mesh_after: dict[str, int]) -> list[str]:
    """Writes a line for each way in which a resumed run differs by more than rounding from an unchanged one.

    Args:
      mesh_before, mesh_after: ranks by axis.
    """
    before, after = flat_values(saved), flat_values(new)
    notes = [
        f"{name} {before[name] or 'none'} → {after[name] or 'none'}: windows come in another order from here on, and "
        f"each source goes on where it was"
        for name in ("data.mixture", "data.curriculum")
        if before[name] != after[name]
    ]
    # What opened the meshes may have said auto.
    saved, new = (
        replace(config, mesh=replace(config.mesh, **dict[str, Any]((axis, mesh.get(axis, 1)) for axis in mesh_after)))
        for config, mesh in ((saved, mesh_before), (new, mesh_after))
    )
    changes = drop_notes(saved, new) + part_notes(saved, new, dropout=True)
    return notes + [f"{note} from here on" for note in changes]


def _changed(before: Mapping[str, Any], after: Mapping[str, Any], names: Iterable[str]) -> str:
    return ", ".join(f"{name} {before[name]} → {after[name]}" for name in names if before[name] != after[name])


def drop_notes(before: Config, after: Config) -> list[str]:
    """Writes a line if the same model drops no choices any more, does so now, or drops others."""
    factor = f"model.capacity_factor={after.model.capacity_factor:g}"
    if after.dropless:
        why = unread_for(after, "model.capacity_factor")
        return [] if before.dropless else [f"{why}: {factor} is not read, and nothing is dropped"]
    if before.dropless:
        return [f"{factor} is read: choices that find their expert full are dropped"]
    changed = _changed(flat_values(before), flat_values(after), _LINES)
    return [f"{changed}: which choices find their expert full ({factor}) depends on it"] if changed else []


def part_notes(before: Config, after: Config, dropout: bool = False) -> list[str]:
    """Writes a line for each way in which another number of parts of a batch, or of replicas, gives another result.

    Args:
      dropout: whether other draws of dropout count.
    """
    model, tuning = after.model, after.tuning
    values, notes, found = (flat_values(before), flat_values(after)), [], list[str]()
    solves = model.is_moe and model.balance == "quantile" and model.balance_step == "next"
    if solves and before.sorts_biases != after.sorts_biases:
        how = "sorted, and not counted in bins," if after.sorts_biases else "counted in bins, and not sorted,"
        split = _changed(*values, ["train.accumulate_steps", "mesh.replica"])
        notes.append(f"{split}: with model.balance=quantile the biases that tokens require are {how}")
    if not (steps := _changed(*values, ["train.accumulate_steps"])):
        return notes
    wholes = [of.train.accumulate_steps if of.model.balance_scope == "part" else 1 for of in (before, after)]
    if model.is_moe and model.balance == "aux_loss" and wholes[0] != wholes[1]:
        found.append("with model.balance_scope=part the balance loss is of other parts")
    if model.is_moe and model.balance_step == "same":
        found.append("with model.balance_step=same quantiles are of other parts")
    if tuning.teacher and tuning.hidden_weight:
        found.append("with tuning.hidden_weight the teacher's distance is of other parts")
    draws = {"model.dropout": model.dropout, "tuning.lora_dropout": tuning.lora_rank and tuning.lora_dropout}
    found += [f"{name} draws other entries" for name, share in draws.items() if dropout and share]
    return notes + [f"{steps}: {what}" for what in found]
