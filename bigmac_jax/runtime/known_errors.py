"""Errors that are no fault of the program: memory or a disk that does not suffice, a store that does not answer."""

import errno
import re

import jax

from bigmac_jax.runtime import storage


def explain(error: BaseException) -> str:
    """The line that a command ends with for such an error; "" for any other."""
    if isinstance(error, MemoryError) or (
        isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
    ):
        size = re.search(r"allocat\w* ([\d.]+ ?\w+)", str(error))  # in the pages that XLA prints
        what = f" (an array of {size[1]})" if size else ""
        return (
            f"memory does not suffice{what}; use fewer tokens at a time (batch, length), more devices, mesh.fsdp or "
            f"execution.remat (`bigmac plan` says what a config takes)"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{error.filename or 'a file'} cannot be written ({error.strerror}); free space"
    if isinstance(error, OSError) and (fix := storage.UNREADABLE_NOW.get(error.errno or 0)) and error.filename:
        return f"{error.filename} cannot be read or written ({error.strerror}); {fix}"
    if storage.is_store_error(error):
        return f"a store can't be read or written now ({storage.reason(error)}); run it again later"
    return ""
