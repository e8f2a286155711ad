"""Exports adapters for Hugging Face's PEFT: adapter_config.json and adapter_model.safetensors, which its
`PeftModel.from_pretrained(base, folder)` adds to the export of the model that they were trained on.

X inputs and Y outputs of a matrix, r rank, E experts. PEFT's A is [r, X] and its B [Y, r]. A layer's experts are one
parameter there, which PEFT takes for [E, outputs, inputs]: A is [E · r, Y] and B [X, r · E]; an expert's rows stand
together, its columns apart.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from bigmac_jax.config import Config, ConfigError
from bigmac_jax.interchange import choose_format, tensor_files
from bigmac_jax.interchange.exporting import FORMATS, gather_layer
from bigmac_jax.interchange.layout import Leaves, Tensor
from bigmac_jax.model.parameters import named_leaves
from bigmac_jax.runtime import hosts, storage
from bigmac_jax.training.restore import Restored

_PREFIX = "base_model.model."
_ORDER = ["", "up_proj", "gate_proj", "down_proj"]  # in which our class' experts declare their parameters


def export_adapters(run: Restored, output: str | pathlib.Path) -> int:
    """Writes the adapters of a checkpoint → how many parameters they have. With several processes, all must call it.

    Raises:
      ConfigError: a run without adapters, some that PEFT has no place for, or `output` is there already.
    """
    config = run.config
    if not config.tuning.lora_rank:
        raise ConfigError("--format=peft is of adapters, and this run trains the whole model; use --format=auto")
    output = storage.absolute(storage.locate(output, "--output"))
    adapters = named_leaves(run.params)
    tensors = list(_adapted_tensors(config, adapters, named_leaves(run.base)))
    with hosts.raise_together():
        if hosts.is_first():
            tensor_files.check_new(output)
    values: dict[str, np.ndarray] = {}
    for tensor in tensors:
        module, parameter = _module(tensor)
        # Parameters of one module are wrapped one around the other, in their order in the class; the last is outermost.
        others = sorted((_module(t)[1] for t in tensors if _module(t)[0] == module), key=_ORDER.index)
        inside = ".base_layer" * (len(others) - 1 - others.index(parameter))
        a, b = (gather_layer(adapters[f"{tensor.leaf}.{name}"], tensor.layer) for name in "ab")
        if a.ndim == 2:
            rows, columns = a.T, b.T
        else:  # PEFT takes [E, X, Y] for [E, outputs, inputs]
            rows, columns = b.reshape(-1, b.shape[-1]), a.transpose(1, 2, 0).reshape(a.shape[1], -1)
        for name, value in (("A", rows), ("B", columns)):
            values[f"{_PREFIX}{module}{inside}.lora_{name}.weight"] = np.ascontiguousarray(value)
    if hosts.is_first():
        with tensor_files.whole_or_nothing(output) as directory:
            save_file(values, directory / "adapter_model.safetensors", metadata={"format": "pt"})
            settings = json.dumps(_settings(config, tensors), indent=2, allow_nan=False)
            (directory / "adapter_config.json").write_text(settings + "\n")
    return sum(value.size for value in values.values())


def _adapted_tensors(config: Config, adapters: Leaves, base: Leaves) -> Iterator[Tensor]:
    """The tensors of an export that have adapters; raises ConfigError for those that PEFT has no place for."""
    kind = choose_format(config)
    matrices = {name.removesuffix(".a") for name in adapters if name.endswith(".a")}
    # What makes a hyper router's matrix is no tensor of an export (`plain_router`), and next-token modules have none.
    base = {name: leaf for name, leaf in base.items() if ".mlp.hyper." not in name and not name.startswith("mtp.")}
    model = dataclasses.replace(config.model, mtp_modules=0, mtp_blocks="")
    for tensor in FORMATS[kind].tensors(model, base):
        if tensor.leaf not in matrices:
            continue
        kinds = {
            "experts": tensor.expert is not None,
            "router": "router" in tensor.leaf,
            "mamba": ".mamba" in tensor.leaf,
        }
        if what := next((name for name, found in kinds.items() if found), ""):
            # Mamba's five projections are one matrix in NemotronH, and PEFT refuses its out_proj.
            raise ConfigError(
                f"--format=peft: PEFT has no place for adapters of the {what} of {kind}; export the whole model with "
                f"--format=auto, or train without {what} in tuning.lora_targets"
            )
        yield tensor


def _module(tensor: Tensor) -> tuple[str, str]:
    """The module of a tensor, and its parameter's name there; "" for the `weight` of a Linear."""
    module, _, name = tensor.name.rpartition(".")
    if module.startswith("backbone."):  # as files of NemotronH have it; its class has `model`, and renames
        module = module.replace("backbone", "model", 1)
    return module, "" if name == "weight" else name


def _settings(config: Config, tensors: list[Tensor]) -> dict[str, Any]:
    """The contents of adapter_config.json."""
    tuning, modules = config.tuning, [_module(tensor) for tensor in tensors]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.train.init_from,
        "r": tuning.lora_rank,
        "lora_alpha": tuning.lora_alpha,
        "lora_dropout": 0.0,  # theirs drops other inputs, and is refused beside parameters
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        # Whole names: the end of one may be that of a matrix without an adapter, too.
        "target_modules": [module for module, name in modules if not name],
        "target_parameters": [f"{module}.{name}" for module, name in modules if name],
    }
