"""How Orbax writes the arrays of a checkpoint here: digested by the process that wrote them."""

import functools
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from bigmac_jax.training import manifest


class _Digested(ocp.StandardCheckpointHandler):
    """Orbax's. A process has saved an item when it has digested what it wrote of it, too (`manifest.write_part`)."""

    async def async_save(self, directory: Any, *args: Any, **kwargs: Any) -> list[ocp.future.Future]:
        written = await super().async_save(directory, *args, **kwargs) or []
        digest = functools.partial(manifest.write_part, pathlib.Path(directory), jax.process_index())
        return [ocp.future.ChainedFuture(written, digest)]  # while the next item is still being written


def arrays_of(*items: str) -> ocp.handlers.DefaultCheckpointHandlerRegistry:
    """The handlers of a checkpoint's items that hold arrays; those of others are Orbax's."""
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for item in items:
        handler = _Digested()
        registry.add(item, ocp.args.StandardSave, handler)
        registry.add(item, ocp.args.StandardRestore, handler)
    return registry
