"""Keeps compiled programs in a folder. One that a kill or a full disk has cut short is deleted, and so written anew:
JAX writes them in place, replaces none, and would compile it at every later start, with a warning of two lines.
"""

import logging
import pathlib
import re
import time
import warnings
from typing import Any

import jax

from bigmac_jax.runtime.storage import is_store, locate

_TROUBLE = re.compile(r"Error (reading|writing) persistent compilation cache entry for '([^'/]+)': (.*)")
_SAID = {
    "reading": "cannot be read ({why}); it is compiled and written anew",
    "writing": "cannot be written ({why}); the next start compiles it again",
    "staying": "cannot be read ({why}), nor deleted; every start compiles it, until somebody deletes it",
}
_BEGAN = time.time()  # what is older was not cut short by this process
_log = logging.getLogger(__name__)


def keep_programs(cache_dir: str) -> None:
    """Has JAX keep what it compiles in `cache_dir`/programs, unless $JAX_COMPILATION_CACHE_DIR says where. Called once
    a process."""
    settings: Any = jax.config  # whose types don't have what modules of JAX define
    if own := settings.jax_compilation_cache_dir:
        folder = locate(own, "JAX_COMPILATION_CACHE_DIR")
    else:
        folder = locate(cache_dir, "cache_dir") / "programs"
        jax.config.update("jax_compilation_cache_dir", str(folder))
    show = warnings.showwarning

    def hear(message: Warning | str, *where: Any, **more: Any) -> None:
        if line := mend(folder, str(message)):
            _log.warning("%s", line)
        else:
            show(message, *where, **more)

    warnings.showwarning = hear


def mend(folder: pathlib.Path, message: str) -> str:
    """Deletes the program that a warning of JAX is about; one line that says so, "" if the message is another."""
    if not (found := _TROUBLE.match(message)):
        return ""
    doing, name, why = found.groups()
    if not is_store(folder):  # which has an object whole or not at all
        for file in folder.glob(f"{name}-*-cache"):  # JAX gives no more than the name: those of other meshes go as well
            try:
                if doing == "reading" or file.stat().st_mtime >= _BEGAN:
                    file.unlink()
            except FileNotFoundError:  # another process was first
                pass
            except OSError:  # somebody else's
                doing = "staying" if doing == "reading" else doing
    return f"a compiled program, {name} in {folder}, {_SAID[doing].format(why=why)}"
