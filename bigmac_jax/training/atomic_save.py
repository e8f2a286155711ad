"""Saves checkpoints whole or not at all: a directory gets its name, or its commit file, after its manifest."""

import os
import pathlib
import time
from typing import Any

from orbax.checkpoint.path import atomicity

from bigmac_jax.runtime.storage import is_store
from bigmac_jax.training import manifest


def temporary_path_class(directory: pathlib.Path) -> type["_Renamed"] | type["_Committed"]:
    """Orbax's class of temporary directories for checkpoints in `directory`."""
    return _Committed if is_store(directory) else _Renamed


class _Renamed(atomicity.AtomicRenameTemporaryPath):
    """Orbax's temporary directory. A step's gets its final name when all processes are done and it has a manifest."""

    async def finalize(self) -> None:
        """On process 0, in the background."""
        final = self.get_final()
        if final.name.isdecimal():
            self._final_path = final.with_name(f"{final.name}{atomicity.TMP_DIR_SUFFIX}-complete")
        await super().finalize()
        if self.get_final() != final:
            manifest.write(pathlib.Path(self._final_path))
            os.replace(self._final_path, final)
            self._final_path = final


class _Committed(atomicity.CommitFileTemporaryPath):
    """The same on a store, which renames nothing: files count when their directory has a commit file, the last one."""

    _checkpoint_metadata_store: Any

    async def finalize(self) -> None:
        final = self.get_final()
        store = self._checkpoint_metadata_store
        if final.name.isdecimal():
            if store is not None:  # as the base does, but before the manifest, which has this file's digest
                self._checkpoint_metadata_store = None
                store.wait_until_finished()
                store.update(file_path=final / "_CHECKPOINT_METADATA", commit_timestamp_nsecs=time.time_ns())
                store.wait_until_finished()
            manifest.write(final)
        await super().finalize()
