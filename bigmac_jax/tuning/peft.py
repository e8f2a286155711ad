"""Exports adapters for Hugging Face's PEFT: adapter_config.json and adapter_model.safetensors, which its
`PeftModel.from_pretrained(base, folder)` adds to the export of the model that they were trained on.

X inputs and Y outputs of a matrix, r rank, E experts. PEFT's A is [r, X] and its B [Y, r]. A layer's experts are one
parameter there, which PEFT takes for [E, outputs, inputs]: A is [E · r, X] and B [Y, r · E]; an expert's rows stand
together, its columns apart.

Several of our matrices may be one of the class: k that read the same inputs and write outputs of their own (Mamba's
five projections, gate and up of Qwen3Moe's experts). Their adapters are one of rank k · r, with their A one behind the
other and their B along the diagonal of its B; alpha is k times as large, so that the scale alpha / r stays.
"""

import json
import logging
import pathlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from bigmac_jax.config import Config, ConfigError
from bigmac_jax.config.reads import unread_for
from bigmac_jax.interchange import choose_format, tensor_files
from bigmac_jax.interchange.exporting import FORMATS, gather_layer
from bigmac_jax.interchange.layout import Leaves, Tensor
from bigmac_jax.model.parameters import declared_leaves
from bigmac_jax.runtime import hosts, storage
from bigmac_jax.training.restore import Restored

_log = logging.getLogger(__name__)
_PREFIX = "base_model.model."
# In which a class declares its experts' parameters.
_ORDER = ["", "weight", "gate_up_proj", "up_proj", "gate_proj", "down_proj"]
_FUSED = {"qwen3_moe": {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}}  # of experts
# PEFT refuses adapters of modules with this name in a class with Mamba, because a fused kernel would read their weight
# past them. It does keep such a module whole.
_WHOLE = {"nemotron_h": "out_proj"}
# Of the class, modules that are no Linear: their weight is a parameter to PEFT.
_ROUTERS = ("gate", "router")
_WHOLE_MODEL = "export the whole model with --format=auto"


@dataclass(frozen=True)
class _Place:
    """What PEFT adapts, or keeps whole.

    Attributes:
      module: of the class.
      parameter: its name in a module that is no Linear; "" for the `weight` of a Linear.
      whole: PEFT takes no adapter there.
      parts: of our parameters, one behind the other in its outputs; of a layer's experts the first stands for all.
    """

    module: str
    parameter: str
    whole: bool
    parts: tuple[Tensor, ...]

    @property
    def name(self) -> str:
        return f"{self.module}.{self.parameter}" if self.parameter else self.module


def export_adapters(
    run: Restored,
    output: str | pathlib.Path,
    base_config: Config,
    read_base: Callable[[], nnx.State],
    dtype: str = "float32",
) -> int:
    """Writes the adapters of a checkpoint → how many parameters they have. With several processes, all must call it.

    Args:
      base_config: of the model that they were trained on.
      read_base: the parameters that the adapters were trained on. It is called only if some go whole: NemotronH's
        out_proj.
      dtype: float32, bfloat16 or float16, of the tensors, but for those of a router that the class has in float32.

    Raises:
      ConfigError: a run without adapters, some that PEFT has no place for, a run whose model is another one without
        them than its base, or `output` is there already.
    """
    config, given = run.config, tensor_files.parse_dtype(dtype)
    if not config.tuning.lora_rank:
        raise ConfigError("--format=peft is of adapters, and this run trains the whole model; use --format=auto")
    output = storage.absolute(storage.locate(output, "--output"))
    adapters, base = declared_leaves(run.params), declared_leaves(run.base)
    places = _find_places(config, adapters, base)
    _check_base(config, base_config)
    with hosts.raise_together():
        if hosts.is_first():
            tensor_files.check_new(output)
    if whole := [place for place in places if place.whole]:
        if hosts.is_first():
            _log.warning("PEFT takes no adapters of %s: %d of them are written whole, adapters merged",
                         _WHOLE[choose_format(config)], len(whole))  # fmt: skip
        base = declared_leaves(read_base())
    values: dict[str, np.ndarray] = {}
    for place in places:
        found = _whole(config, place, adapters, base) if place.whole else _pair(place, adapters)
        inside, exact = ".base_layer" * _depth(place, places), place.parts[0].exact
        values |= {
            f"{_PREFIX}{place.module}{inside}.{name}": value if exact else value.astype(given)
            for name, value in found.items()
        }
    with hosts.raise_together():
        if hosts.is_first():
            with tensor_files.whole_or_nothing(output) as directory:
                save_file(values, directory / "adapter_model.safetensors", metadata={"format": "pt"})
                settings = json.dumps(_settings(config, places), indent=2, allow_nan=False)
                (directory / "adapter_config.json").write_text(settings + "\n")
    return sum(leaf.size for leaf in adapters.values())


def _find_places(config: Config, adapters: Leaves, base: Leaves) -> list[_Place]:
    """Where each adapter goes; raises ConfigError for those that PEFT has no place for."""
    kind = choose_format(config)
    if kind == "bigmac_jax":
        fix = "export the whole model with --format=plain"
        raise ConfigError(f"--format=peft: transformers has no class for this model, which PEFT would adapt; {fix}")
    matrices = {name.removesuffix(".a") for name in adapters if name.endswith(".a")}
    places = [place for place in _all_places(config, kind, base) if any(t.leaf in matrices for t in place.parts)]
    if left := matrices - {tensor.leaf for place in places for tensor in place.parts}:
        # What makes a hyper router's matrix is no tensor of an export (`plain_router`).
        raise ConfigError(f"--format=peft: {kind} has no matrix for adapters of {min(left)}; {_WHOLE_MODEL}")
    return places


def _check_base(config: Config, base: Config) -> None:
    """Raises ConfigError if the run's model differs from its base in what adapters do not say."""
    kind, other, place = choose_format(config), choose_format(base), config.train.init_from
    for name in ("vocab_size", "rope_theta"):  # fields of the class that train.init_from lets differ
        before, now = getattr(base.model, name), getattr(config.model, name)
        if before != now and not unread_for(config, f"model.{name}"):
            raise ConfigError(
                f"--format=peft: model.{name}={now} differs from {before} of train.init_from={place}, by which PEFT "
                f"would run the adapters; {_WHOLE_MODEL}"
            )
    if kind != other:
        raise ConfigError(
            f"--format=peft: {kind} is the class of the run, and {other} that of train.init_from={place}, which PEFT "
            f"would adapt; {_WHOLE_MODEL}"
        )


def _all_places(config: Config, kind: str, base: Leaves) -> Iterator[_Place]:
    # Next-token modules have no adapters.
    base = {name: leaf for name, leaf in base.items() if ".mlp.hyper." not in name and not name.startswith("mtp.")}
    places: dict[str, _Place] = {}
    for tensor in FORMATS[kind].tensors(replace(config.model, mtp_modules=0, mtp_blocks=""), base):
        module, _, parameter = tensor.name.rpartition(".")
        if tensor.expert is not None:  # a tensor of each in files, one of all in the class
            if tensor.expert:
                continue
            module, _, parameter = module.rpartition(".")
            module, parameter = module.removesuffix(".0"), _FUSED.get(kind, {}).get(parameter, parameter)
        last = module.rpartition(".")[2]
        if parameter == "weight" and last not in _ROUTERS:
            parameter = ""
        if module.startswith("backbone."):  # as files of NemotronH have it; its class has `model`, and renames
            module = module.replace("backbone", "model", 1)
        place = _Place(module, parameter, last == _WHOLE.get(kind), (tensor,))
        known = places.get(place.name, place)
        places[place.name] = place if known is place else replace(known, parts=(*known.parts, tensor))
    yield from places.values()


def _pair(place: _Place, adapters: Leaves) -> dict[str, np.ndarray]:
    """lora_A and lora_B of a place."""
    parts: list[tuple[slice, np.ndarray, np.ndarray]] = []
    first = 0
    for tensor in place.parts:
        a, b = (gather_layer(adapters[f"{tensor.leaf}.{name}"], tensor.layer) for name in "ab")
        if not tensor.transposed:  # experts that are [E, X, Y], which PEFT takes for [E, outputs, inputs]
            a, b = b.swapaxes(-1, -2), a.swapaxes(-1, -2)
        a_EXr, b_ErY = (matrix.reshape(-1, *matrix.shape[-2:]) for matrix in (a, b))
        parts.append((slice(first, first + b_ErY.shape[2]), a_EXr, b_ErY))
        first += b_ErY.shape[2]
    a_ErX = np.concatenate([a_EXr.swapaxes(1, 2) for _, a_EXr, _ in parts], axis=1)
    b_EYr = np.zeros((a_ErX.shape[0], first, a_ErX.shape[1]), np.float32)
    column = 0
    for rows, _, b_ErY in parts:
        b_EYr[:, rows, column : column + b_ErY.shape[1]] = b_ErY.swapaxes(1, 2)
        column += b_ErY.shape[1]
    b_YrE = b_EYr.transpose(1, 2, 0)
    pair = {"A": a_ErX.reshape(-1, a_ErX.shape[2]), "B": b_YrE.reshape(first, -1)}
    return {f"lora_{name}.weight": np.ascontiguousarray(value) for name, value in pair.items()}


def _whole(config: Config, place: _Place, adapters: Leaves, base: Leaves) -> dict[str, np.ndarray]:
    """A Linear of the class with its adapters merged."""
    (tensor,) = place.parts
    a, b = (gather_layer(adapters[f"{tensor.leaf}.{name}"], tensor.layer) for name in "ab")
    w = gather_layer(base[tensor.leaf], tensor.layer) + config.tuning.lora_alpha / config.tuning.lora_rank * a @ b
    found = {"weight": np.ascontiguousarray(w.T)}
    if (bias := tensor.leaf.replace("w_DF", "b_F")) in base:
        found["bias"] = gather_layer(base[bias], tensor.layer)
    return found


def _depth(place: _Place, places: list[_Place]) -> int:
    """Parameters of one module are wrapped one around the other, in their order in the class; the last is outermost."""
    names = sorted((other.parameter for other in places if other.module == place.module), key=_ORDER.index)
    return len(names) - 1 - names.index(place.parameter)


def _settings(config: Config, places: list[_Place]) -> dict[str, Any]:
    """The contents of adapter_config.json."""
    tuning, adapted = config.tuning, [place for place in places if not place.whole]
    # Keys are patterns to PEFT.
    several = {re.escape(place.name): len(place.parts) for place in adapted if len(place.parts) > 1}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.train.init_from,
        "r": tuning.lora_rank,
        "lora_alpha": tuning.lora_alpha,
        "rank_pattern": {name: count * tuning.lora_rank for name, count in several.items()},
        "alpha_pattern": {name: count * tuning.lora_alpha for name, count in several.items()},
        "lora_dropout": 0.0,  # theirs drops other inputs, and is refused beside parameters
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        # Whole names: the end of one may be that of a matrix without an adapter, too.
        "target_modules": [place.name for place in adapted if not place.parameter],
        "target_parameters": [place.name for place in adapted if place.parameter],
        "modules_to_save": [place.name for place in places if place.whole] or None,
    }
