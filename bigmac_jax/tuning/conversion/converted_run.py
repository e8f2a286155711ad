"""Writes a converted model as a run at step 0, and reports what the conversion did."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from bigmac_jax.config import Config, ConfigError, TuningConfig, strict_json
from bigmac_jax.config.reading import retrained
from bigmac_jax.data.batch import NO_TARGET, Batch, batch_from_windows, number_documents
from bigmac_jax.data.chat_files import read_chat_folder
from bigmac_jax.data.pipeline import pad_batch
from bigmac_jax.data.token_cache import TokenStream
from bigmac_jax.data.tokenizer import Tokenizer
from bigmac_jax.interchange.importing import MAY_SET
from bigmac_jax.interchange.tokenizer_files import keep_tokenizer
from bigmac_jax.model.mesh import batch_ranks, batch_spec, place
from bigmac_jax.model.parameters import declared_leaves
from bigmac_jax.model.transformer import Transformer
from bigmac_jax.runtime import storage
from bigmac_jax.runtime.workdir_lock import lock_workdir
from bigmac_jax.training import programs
from bigmac_jax.training.new_run import check_new, write_new_run
from bigmac_jax.tuning.conversion.latent import LayerError


class Report(NamedTuple):
    """What a conversion did.

    Attributes:
      loss_before, loss_after: nats a token of the validation split.
      experts: parameters of all routed experts, before and after; of a dense model its MLPs'.
    """

    action: str
    loss_before: float
    loss_after: float
    experts: tuple[int, int]
    layers: list[LayerError]

    def lines(self) -> list[str]:
        """The report for people."""
        before, after = self.experts
        lines = [
            f"layer {layer}: {total:.1%} of what the experts put out is lost ({inputs:.1%} of their hidden units' "
            f"squares by W↓, {outputs:.1%} of the output's by W↑)"
            for layer, total, inputs, outputs in self.layers
        ]
        lines.append(f"experts' parameters {before:,} → {after:,} ({after / before:.3g} of them)")
        lines.append(f"validation loss {self.loss_before:.4f} → {self.loss_after:.4f} nats a token, untrained")
        return lines


def new_run_config(config: Config, overrides: Sequence[str]) -> Config:
    """The config of the new run: of the old one, without its tuning, with the overrides of how it is trained.

    Raises:
      ConfigError: an override of the model, or one that a run at step 0 can't have.
    """
    for override in overrides:
        if not override.startswith(MAY_SET):
            raise ConfigError(f"--config.{override}: the model says what it is; only how it is trained can be set here")
        if override.startswith("data.tokenizer="):
            raise ConfigError(f"--config.{override}: a model keeps the tokenizer that it was trained with; drop it")
    train = dataclasses.replace(config.train, init_from="", tasks="", tasks_every=0, choices_from=0, choices_steps=0)
    fresh = dataclasses.replace(config, train=train, tuning=TuningConfig())
    return check_new(retrained(fresh, overrides))


def sample_windows(config: Config, stream: TokenStream, tokens: int) -> list[Batch]:
    """Takes about so many tokens in windows spread evenly over the stream, in batches as in training."""
    L, rows = config.data.sequence_length, -(-config.data.batch_size // batch_ranks()) * batch_ranks()
    there = (stream.num_tokens - 1) // L
    if not there:
        raise ConfigError(f"data.source={config.data.source} has fewer tokens than a window of {L}; use more text")
    count = min(there, -(-tokens // L))
    starts = np.linspace(0, there - 1, count).round().astype(int) * L
    batches = []
    for first in range(0, count, rows):
        windows = [stream.tokens(start, start + L + 1) for start in starts[first : first + rows]]
        batch = batch_from_windows(np.stack(windows))
        if config.data.documents == "masked":
            batch = batch._replace(segments_BL=number_documents(batch.inputs_BL, stream.eos_id))
        batches.append(pad_batch(batch, rows))
    return batches


def measure(
    action: str, before: Transformer, after: Transformer, layers: list[LayerError], validation: Sequence[Batch]
) -> Report:
    """Measures the loss and the size of a model before and after its conversion."""
    losses = [_loss(model, validation) for model in (before, after)]
    return Report(action, losses[0], losses[1], (_experts(before), _experts(after)), layers)


def write_converted_run(
    source: pathlib.Path,
    output: pathlib.Path,
    config: Config,
    model: Transformer,
    tokenizer: Tokenizer,
    report: Report,
    overrides: Sequence[str],
    history: Sequence[str],
) -> Config:
    """Writes a converted model as a run at step 0, with copies of the source's tokenizer and chat template and with
    conversion.json; if layers were made narrow, also a picture of each one's error. Returns the run's config."""
    with lock_workdir(output):
        config = new_run_config(keep_tokenizer(output, config, tokenizer, read_chat_folder(source)), overrides)
        values = report._asdict() | {"layers": [layer._asdict() for layer in report.layers]}
        storage.write_atomically(output / "conversion.json", (strict_json(values, indent=2) + "\n").encode())
        if report.layers:
            _draw(report, output / "conversion.png")
        write_new_run(output, config, model, [*history, f"`bigmac convert {report.action}`"])
    return config


def _loss(model: Transformer, batches: Sequence[Batch]) -> float:
    total, count = 0.0, 0
    for batch in batches:
        counts_BL = batch.targets_BL != NO_TARGET
        nll_BL = np.asarray(programs.evaluate(model, place(batch, batch_spec(2))).nll_BL, np.float64)
        total, count = total + nll_BL[counts_BL].sum(), count + counts_BL.sum()
    return float(total / count)


def _experts(model: Transformer) -> int:
    part = ".mlp.experts." if model.config.model.is_moe else ".mlp."
    return sum(leaf.size for name, leaf in declared_leaves(model).items() if part in name)


def _draw(report: Report, file: pathlib.Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots()
    names = {"total": "experts' output", "inputs": "hidden units, by W↓", "outputs": "output, by W↑"}
    for name, label in names.items():
        axis.plot([of.layer for of in report.layers], [getattr(of, name) for of in report.layers], "o-", label=label)
    axis.set(xlabel="layer", ylabel="share of squares lost", ylim=(0, None), title="What a narrow exchange cuts off")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.3)
    axis.legend()
    storage.save_figure(figure, file)
