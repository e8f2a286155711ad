"""Pretrained models: the one that a run begins with (train.init_from), found, compared with the run's config and read.

V vocabulary, D hidden.
"""

import contextlib
import dataclasses
import logging
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from bigmac_jax.config import (
    Config,
    ConfigError,
    DataConfig,
    ModelConfig,
    TuningConfig,
    missing_place_fix,
    read_object,
)
from bigmac_jax.config.reads import unread_for
from bigmac_jax.data.chat_files import read_chat, read_chat_folder
from bigmac_jax.data.tokenizer import Tokenizer, load_tokenizer
from bigmac_jax.interchange import import_model, open_checkpoint
from bigmac_jax.interchange.importing import checkpoint_digest
from bigmac_jax.interchange.tokenizer_files import TOKENIZER_FILES, extends, warn_of_added
from bigmac_jax.model.adapters import attached, merged
from bigmac_jax.model.mesh import placed, replicated_spec
from bigmac_jax.model.parameters import declared_leaves, leaf_name, with_padding
from bigmac_jax.model.transformer import Transformer, init_model
from bigmac_jax.runtime import hosts, storage
from bigmac_jax.training.history import history_with, model_name
from bigmac_jax.training.restore import find_checkpoint, restore_parts
from bigmac_jax.training.step import split_model
from bigmac_jax.training.workdir import has_run, read_config, read_run_json, use_saved_tokenizer

INIT_FROM = "init_from"  # the key of a run's pretrained model in run.json's `data`
# Fields of the model that may differ from the pretrained one's without a word, and those that may with one.
_FREE = (
    "dropout", "capacity_factor", "overflow", "overflow_tries", "balance_coefficient", "balance_scope",
    "balance_bias_rate", "z_loss_coefficient", "projection_init", "context_length",
)  # fmt: skip
_TOLD = ("vocab_size", "rope_theta", "balance", "balance_step")
_LAYERS = ("num_layers", "blocks", "first_dense_layers")
# Fields that may say the same in several ways: what each is computed as.
_COMPUTED: dict[str, Callable[[ModelConfig], Any]] = {
    **dict.fromkeys(_LAYERS, lambda m: m.loops),  # by which parameters are stacked and called
    "num_kv_heads": lambda m: m.kv_heads,
    "head_dim": lambda m: m.head_size,
    "num_experts": lambda m: m.expert_count,
    "dense_hidden_size": lambda m: m.mlp_width,
    "down_ratio": lambda m: (m.wire_size, m.expert_count, m.expert_width, m.shared_width),
    "expert_hidden_size": lambda m: m.expert_width,
    **dict.fromkeys(("num_shared_experts", "shared_expert_hidden_size"), lambda m: m.shared_width),
    "group_scores": lambda m: m.group_best,
    "mamba_heads": lambda m: m.mamba_head_count,
    "mtp_blocks": lambda m: m.mtp_stack.blocks,
}
_log = logging.getLogger(__name__)


class Pretrained(NamedTuple):
    """A trained model that a run begins with or learns from, found but not read.

    Attributes:
      place: a workdir, or a folder with config.json and safetensors.
      step: of the checkpoint; "" of a folder.
      digest: of the checkpoint's manifest, or the folder's files.
      config: the model's own; data.tokenizer is what it was trained with.
    """

    place: str
    step: str
    digest: str
    config: Config

    @property
    def identity(self) -> str:
        """What run.json records of it, to tell the same model from another."""
        return f"{self.step}:{self.digest}"

    @property
    def folder(self) -> pathlib.Path:
        """Its workdir, or the folder that holds it."""
        path = storage.locate(self.place, "train.init_from")
        return path.parent.parent if self.step and path.parent.name == "checkpoints" else path


def open_pretrained(place: str, identity: str = "", name: str = "train.init_from") -> Pretrained:
    """Finds the model that the field `name` names: a workdir's newest checkpoint, `WORKDIR/checkpoints/N`, or a folder.

    No device is touched; with several processes, all must call it.

    Args:
      identity: the one that it must have; of a workdir, the checkpoint of its step is taken.

    Raises:
      ConfigError: there is no model, or another one.
    """
    step, recorded, found = "latest", identity.partition(":")[0], None
    with hosts.raise_together():
        path = storage.locate(place, name)
        if path.parent.name == "checkpoints":
            step, path = path.name, path.parent.parent
        if (path / "config.json").is_file() and "model_type" in read_object(
            storage.check_inside(path, "config.json"), "copy it again"
        ):
            with storage.local_folder(path) as directory:
                config = _named_at(path, directory, open_checkpoint(directory)[0])
                found = Pretrained(place, "", checkpoint_digest(directory, path), config)
        elif not has_run(path):
            fix = missing_place_fix(place, "give the workdir of a run, an export, or a folder of Hugging Face")
            raise ConfigError(f"{name}={place} holds no model; {fix}")
    hosts.check_same({f"the model of {name}={place}": found.digest[:12] if found else "a run"})
    if found is None:
        number, digest = find_checkpoint(path, recorded or step)
        with hosts.raise_together():
            found = Pretrained(place, str(number), digest, use_saved_tokenizer(path, read_config(path)))
    with hosts.raise_together():
        if identity and found.identity != identity:
            raise ConfigError(f"{name}={place} is not the model that this run was started with; bring that back")
    return found


def _named_at(path: pathlib.Path, copy: pathlib.Path, config: Config) -> Config:
    """The config with the tokenizer of the folder itself, in place of that of a copy, which does not last."""
    tokenizer = pathlib.Path(config.data.tokenizer)
    if tokenizer.parent != copy.absolute():
        return config
    own = str(storage.absolute(path) / tokenizer.name)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=own))


def open_recorded(workdir: pathlib.Path, place: str, key: str, name: str) -> Pretrained:
    """Finds the model that the field `name` of a run names; once the run has begun, the one that its run.json has under
    `key`. Errors as for `open_pretrained`."""
    identity = hosts.run_on_first(lambda: read_run_json(workdir)["data"].get(key, ""))
    try:
        return open_pretrained(place, identity, name)
    except ConfigError as error:
        if not identity:
            raise
        step = identity.partition(":")[0]
        of_step = f", with its checkpoint {step}" if step else ""
        raise ConfigError(
            f"{error} ({workdir} needs {name}={place} as it was{of_step}; if that was moved, resume once with "
            f"--config.{name}=PLACE)"
        ) from None


def open_init_from(workdir: pathlib.Path, config: Config) -> Pretrained:
    """Finds the model that a run begins with (train.init_from)."""
    return open_recorded(workdir, config.train.init_from, INIT_FROM, "train.init_from")


def history_of(origin: Pretrained | None) -> list[str]:
    """What a run begins with, as its run.json keeps it; [] of random parameters."""
    if origin is None:
        return []
    if origin.step:
        return history_with(origin.folder, origin.config, int(origin.step))
    return [f"`{model_name(origin.place)}`, of whose training its own card tells"]


def with_absolute_places(config: Config) -> Config:
    """The config with absolute paths of train.init_from and tuning.teacher, for any working directory."""

    def absolute(place: str, name: str) -> str:
        return place and str(storage.absolute(storage.locate(place, name)))

    train = dataclasses.replace(config.train, init_from=absolute(config.train.init_from, "train.init_from"))
    tuning = dataclasses.replace(config.tuning, teacher=absolute(config.tuning.teacher, "tuning.teacher"))
    return dataclasses.replace(config, train=train, tuning=tuning)


def inherit_config(origin: Pretrained, given: Mapping[str, str]) -> Config:
    """Makes the config that a run beginning with `origin` has before its user's fields: that model, trained as it was.

    Args:
      given: the user's fields by full name; where they name data, neither data nor held-out splits are inherited.
    """
    config, data = origin.config, origin.config.data
    if given.get("data.source") or given.get("data.mixture"):
        data = dataclasses.replace(
            data, source=DataConfig.source, validation_source="", test_source="", mixture="", curriculum=""
        )
    # Choices have grown: they don't begin anew.
    train = dataclasses.replace(
        config.train, init_from=origin.place, tasks="", tasks_every=0, choices_from=0, choices_steps=0
    )
    return dataclasses.replace(config, data=data, train=train, tuning=TuningConfig())


def choose_tokenizer(origin: Pretrained, config: Config) -> Tokenizer:
    """Loads the tokenizer of a run that begins with `origin`: that one's, or data.tokenizer if it extends it.

    Raises:
      ConfigError: tokens would mean something else than the model has learned.
    """
    own = own_tokenizer(origin, config)
    if own and not origin.step:  # no run of ours, which learned from texts as they are
        warn_of_added(origin.place, own)
    if config.data.tokenizer == "bpe":  # would be trained on the new text
        if own is None:
            raise ConfigError(f"train.init_from={origin.place} holds no tokenizer; give data.tokenizer")
        return own
    given = load_tokenizer(config)
    if own is not None and not extends(given, own):
        raise ConfigError(
            f"data.tokenizer={config.data.tokenizer} gives other ids than the tokenizer of train.init_from="
            f"{origin.place}; leave data.tokenizer=bpe to take that, or give one that only adds tokens to it"
        )
    return given


def own_tokenizer(origin: Pretrained, config: Config) -> Tokenizer | None:
    """Loads the tokenizer that a model was trained with; None if its folder holds none. Of a folder whose tokenizer has
    more ids than its table has rows, a run's larger table (`config`) has room for them."""
    name = origin.config.data.tokenizer
    if name.endswith(TOKENIZER_FILES) and not storage.locate(name, "data.tokenizer").is_file():
        return None
    return load_tokenizer(dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=name)))


def with_pretrained_chat(origin: Pretrained, config: Config) -> Config:
    """The config to encode rows by: with the pretrained model's tokenizer and chat template where it names none."""
    data, tuning = config.data, config.tuning
    if data.tokenizer == "bpe":
        data = dataclasses.replace(data, tokenizer=origin.config.data.tokenizer)
    own = read_chat(tuning.chat_template, data.tokenizer, "tuning.chat_template").template
    if not own and read_chat_folder(origin.folder).template:
        tuning = dataclasses.replace(tuning, chat_template=str(origin.folder))
    return dataclasses.replace(config, data=data, tuning=tuning)


def compare_models(origin: Pretrained, config: Config) -> list[str]:
    """The differences between the pretrained model and the run's that are allowed, each as `field before → now`.

    Raises:
      ConfigError: a difference that does not fit the parameters.
    """
    before, now = origin.config.resolved.model, config.resolved.model
    told = []
    for field in dataclasses.fields(ModelConfig):
        old, new = getattr(before, field.name), getattr(now, field.name)
        read = any(not unread_for(of, f"model.{field.name}") for of in (origin.config, config))
        if old == new or field.name in _FREE or not read:
            continue
        if field.name.startswith("mtp_") and not now.mtp_modules:  # its next-token modules are left out
            told += [f"model.mtp_modules {old} → 0"] if field.name == "mtp_modules" else []
            continue
        if field.name in _COMPUTED and _COMPUTED[field.name](before) == _COMPUTED[field.name](now):
            continue
        if field.name in _LAYERS and _branches(before) == _branches(now):
            raise ConfigError(
                f"{_spelled(now)} gives the layers of train.init_from={origin.place} in other loops, by which its "
                f"parameters are stacked; use {_spelled(before)}"
            )
        if field.name not in _TOLD:
            raise ConfigError(
                f"model.{field.name}={new!r} differs from {old!r} of train.init_from={origin.place}, whose parameters "
                f"are of that model; drop it, or begin without train.init_from"
            )
        told.append(f"model.{field.name} {old} → {new}")
    if now.vocab_size < before.vocab_size:
        raise ConfigError(
            f"model.vocab_size={now.vocab_size} must be at least the {before.vocab_size} of train.init_from="
            f"{origin.place}; a table of tokens can only grow"
        )
    if now.is_moe and before.has_router_bias and not now.has_router_bias:
        raise ConfigError(
            f"model.balance={now.balance} would lose the router's bias of train.init_from={origin.place}; keep "
            f"balance={before.balance}, or use balance=bias with balance_bias_rate=0, which leaves it as it is"
        )
    length, length_before = config.data.sequence_length, origin.config.data.sequence_length
    context, context_before = config.context_length, origin.config.context_length
    if now.positions == "learned" and context > context_before:
        name = "data.sequence_length" if length == context else "model.context_length"
        raise ConfigError(
            f"{name}={context} must be at most the {context_before} learned positions of train.init_from="
            f"{origin.place}; use {context_before}"
        )
    if length != length_before:
        told.append(f"data.sequence_length {length_before} → {length}")
    if context != context_before and (context, context_before) != (length, length_before):
        told.append(f"model.context_length {context_before} → {context}")
    rate_before, rate = origin.config.projection_rate, config.projection_rate
    if now.structure == "bigmac" and rate_before != rate:
        told.append(f"optimizer.projection_rate {rate_before:g} → {rate:g}")
    return told


def _branches(m: ModelConfig) -> str:
    """All residual branches of a model, in their order."""
    return "".join("".join(loop.layers) * loop.trips for loop in m.loops)


def _spelled(m: ModelConfig) -> str:
    """The fields that say which layers a model has."""
    return f"model.blocks={m.blocks or repr('')} with " + " and ".join(
        f"model.{name}={getattr(m, name)}" for name in ("num_layers", "first_dense_layers")
    )


def load_parameters(origin: Pretrained, config: Config) -> tuple[nnx.State, nnx.State]:
    """Reads the parameters and the rest of a model, in the shapes of `config`, onto the current mesh.

    New rows of a table of tokens are the mean of the old ones, so that new tokens are as likely as an average one
    (Hewitt, "Initializing New Word Embeddings", 2021).
    """
    compare_models(origin, config)
    source = dataclasses.replace(origin.config, mesh=config.mesh, execution=config.execution)
    found = declared_leaves(read_model(origin, source))
    abstract = placed(jax.eval_shape(lambda: init_model(config, jax.random.key(0))), jax.sharding.get_mesh())
    wanted = declared_leaves(abstract)

    def fit(path: Any, like: Any) -> Array:
        name = leaf_name(path)
        if name not in found:  # a router's bias that balancing begins with
            return jax.jit(lambda: jnp.zeros(like.shape, like.dtype, out_sharding=like.sharding.spec))()
        same = found[name].shape == wanted[name].shape
        return with_padding(found[name] if same else _resize(found[name], wanted[name]), like)

    _, params, rest = split_model(jax.tree_util.tree_map_with_path(fit, abstract))
    return params, rest


def read_model(origin: Pretrained, source: Config) -> Transformer:
    """Reads a pretrained model onto the current mesh. `source` is its config, with that mesh."""
    if origin.step:
        return restore_step(origin.folder, origin.step, source)[1]
    values = source.as_dict()
    sections = [(section, name) for section in ("mesh", "execution") for name in values[section]]
    overrides = [f"{section}.{name}={values[section][name]}" for section, name in sections]
    with contextlib.ExitStack() as stack:
        with hosts.raise_together():  # a store may fail for one process alone
            directory = stack.enter_context(storage.local_folder(origin.folder))
        return import_model(directory, overrides)[1]


def read_base(workdir: str | pathlib.Path, config: Config) -> nnx.State:
    """Reads the parameters that the adapters of a run were trained on, onto the current mesh.

    Raises:
      ConfigError: that model is gone.
    """
    if hosts.is_first():
        _log.info("reads train.init_from=%s, which the adapters of %s are of", config.train.init_from, workdir)
    return load_parameters(open_init_from(storage.locate(workdir, "workdir"), config), config)[0]


def _resize(table: Array, like: Any) -> Array:
    """Gives a table [V, D] more rows, or positions [L, D] fewer. For a moment each rank holds it whole."""

    def resize(table_VD: Array) -> Array:
        table_VD = jax.sharding.reshard(table_VD, replicated_spec(2))
        more = like.shape[0] - table_VD.shape[0]
        if more > 0:
            mean_1D = table_VD.mean(0, keepdims=True)
            table_VD = jnp.concatenate([table_VD, jnp.broadcast_to(mean_1D, (more, table_VD.shape[1]))])
        return jax.sharding.reshard(table_VD[: like.shape[0]], like.sharding.spec)

    return jax.jit(resize)(table)


def restore(
    workdir: str | pathlib.Path, step: str = "latest", config: Config | None = None, in_host: bool = False
) -> tuple[Config, Transformer]:
    """Reads the config and the model of a training run; adapters are merged into the model that they were trained on.

    The config names the run's own copy of its tokenizer. The model is sharded on the current mesh; without one, the
    config's mesh becomes current.

    Args:
      step: "latest", "best" (by eval/loss) or a number.
      config: the run's config with another mesh; by default as it was saved.
      in_host: reads the experts into host memory, for `resident.hold` or a decoder; with adapters they come to the
        devices first.

    Raises:
      ConfigError: no such run or checkpoint; or the model that adapters were trained on is gone.
    """
    return restore_step(workdir, step, config, in_host)[:2]


def restore_step(
    workdir: str | pathlib.Path, step: str, config: Config | None, in_host: bool = False
) -> tuple[Config, Transformer, int, float | None]:
    """As `restore`; also the checkpoint's step, and its eval/loss if it was evaluated."""
    found = restore_parts(workdir, step, config, in_host)
    config, params = found.config, found.params
    if config.tuning.lora_rank:
        base = read_base(workdir, config)
        merge = jax.jit(lambda base, adapters: merged(attached(config, base, adapters)), donate_argnums=0)
        params = merge(base, params)
    return config, nnx.merge(found.graphdef, params, found.rest), found.step, found.loss
