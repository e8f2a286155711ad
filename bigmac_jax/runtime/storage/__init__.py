"""Where a run reads and writes: local disks, Google Cloud Storage (`gs://`) and S3 (`s3://`).

A path is a `pathlib.Path` on a disk and an `etils.epath.Path` on a store. The second has the methods of the first but
for those that stand here.
"""

from bigmac_jax.runtime.storage.leases import HeldError, Lease, locked
from bigmac_jax.runtime.storage.mirror import Mirror
from bigmac_jax.runtime.storage.paths import (
    absolute,
    children,
    errors,
    fetch_file,
    fetch_tree,
    files_below,
    is_of_store,
    is_store,
    local_copies,
    local_file,
    local_folder,
    locate,
    make_folder,
    matches,
    move,
    open_lines,
    reason,
    remove_tree,
    save_figure,
    send_file,
    send_tree,
    size_of,
    version_of,
    within,
    write_whole,
)

__all__ = [
    "HeldError",
    "Lease",
    "Mirror",
    "absolute",
    "children",
    "errors",
    "fetch_file",
    "fetch_tree",
    "files_below",
    "is_of_store",
    "is_store",
    "local_copies",
    "local_file",
    "local_folder",
    "locate",
    "locked",
    "make_folder",
    "matches",
    "move",
    "open_lines",
    "reason",
    "remove_tree",
    "save_figure",
    "send_file",
    "send_tree",
    "size_of",
    "version_of",
    "within",
    "write_whole",
]
