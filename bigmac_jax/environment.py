"""What the process environment must hold before the program starts, in one place.

The entry points call `prepare()` first; it re-executes the program once with these settings. BIGMAC_KEEP_ENV=1 turns
it off, and a variable that is already set is left as it is.
"""

import os
import sys

# variable → (value, where, reason with its figure)
SETTINGS = {
    "GLIBC_TUNABLES": (
        "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.arena_max=1"
        ":glibc.malloc.trim_threshold=68719476736",
        "linux",
        "Huge pages for malloc, and freed memory kept: XLA:CPU allocates its buffers anew in every step, and fresh "
        "pages fault one by one. docs/performance.md has the figure.",
    ),
}


def prepare() -> None:
    """Re-executes the running program with SETTINGS, once; returns if there is nothing to set."""
    missing = {
        name: value
        for name, (value, platform, _) in SETTINGS.items()
        if sys.platform == platform and name not in os.environ
    }
    if missing and "BIGMAC_KEEP_ENV" not in os.environ:
        os.execve(
            sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **missing, "BIGMAC_KEEP_ENV": "1"}
        )
