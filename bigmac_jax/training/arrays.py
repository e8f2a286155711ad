"""The arrays of a checkpoint: digested by the process that wrote them, and of the shapes that a config asks for."""

import functools
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from bigmac_jax.config import ConfigError
from bigmac_jax.storage import locate
from bigmac_jax.training import manifest


class _Digested(ocp.StandardCheckpointHandler):
    """Orbax's. A process has saved an item when it has digested what it wrote of it, too (`manifest.write_part`)."""

    async def async_save(self, directory: Any, *args: Any, **kwargs: Any) -> list[ocp.future.Future]:
        written = await super().async_save(directory, *args, **kwargs) or []
        digest = functools.partial(manifest.write_part, locate(directory, "checkpoint"), jax.process_index())
        return [ocp.future.ChainedFuture(written, digest)]  # while the next item is still being written


def arrays_of(*items: str) -> ocp.handlers.DefaultCheckpointHandlerRegistry:
    """The handlers of a checkpoint's items that hold arrays; those of others are Orbax's."""
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for item in items:
        handler = _Digested()
        registry.add(item, ocp.args.StandardSave, handler)
        registry.add(item, ocp.args.StandardRestore, handler)
    return registry


def check_shapes(directory: pathlib.Path, step: int, abstract: dict[str, Any]) -> None:
    """Raises ConfigError if the model of a checkpoint is another than `abstract`; it names the first difference."""

    def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
        paths = jax.tree_util.tree_flatten_with_path(tree)[0]
        named = {jax.tree_util.keystr(keys, simple=True, separator="."): leaf.shape for keys, leaf in paths}
        return {key.split(".", 1)[1].removesuffix(".value"): shape for key, shape in named.items()}

    path = directory / str(step) / "model"
    saved, wanted = shapes(ocp.PyTreeCheckpointHandler().metadata(path).tree), shapes(abstract)
    for name in sorted(saved.keys() | wanted.keys()):
        if saved.get(name) != wanted.get(name):
            has, needs = (list(s[name]) if name in s else "none" for s in (saved, wanted))
            raise ConfigError(
                f"checkpoint {step} of {directory} is of another model: its {name} is {has}, the config asks "
                f"for {needs}; use the config.json it was trained with"
            )
