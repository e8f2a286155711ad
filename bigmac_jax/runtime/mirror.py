"""Copies growing files, such as metrics, to a store, whose objects cannot grow."""

import logging
import pathlib
import tempfile
import threading
import time

from bigmac_jax.runtime.storage import AWAY, errors, filesystem, is_store, reason, write_atomically

_EVERY = 30.0  # seconds
_log = logging.getLogger(__name__)


class Mirror:
    """A local `folder` whose files are copied to `place`. If that is on a disk, `folder` is `place` itself.

    What was written since the last copy is lost if the process is killed.
    """

    def __init__(self, place: pathlib.Path):
        self._place, self._sent = place, dict[pathlib.Path, tuple[int, int]]()
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._last, self._copying = time.monotonic(), threading.Lock()
        self._thread: threading.Thread | None = None
        self.folder = place
        if is_store(place):
            self._temporary = tempfile.TemporaryDirectory(prefix="bigmac_jax-")
            self.folder = pathlib.Path(self._temporary.name)

    def fetch(self, name: str) -> None:
        """Copies a file that an earlier start left in `place`, if there is one, into the folder."""
        if self._temporary is not None and (self._place / name).exists():
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            filesystem(self._place).get_file(str(self._place / name), str(self.folder / name))

    def copy(self) -> None:
        """Copies what has changed, now; raises the store's error if it stays away for AWAY seconds."""
        end = time.monotonic() + AWAY
        while self._temporary is not None:
            try:
                self._copy()
                return
            except errors():
                if time.monotonic() > end:
                    raise
                time.sleep(1)

    def _copy(self) -> None:
        with self._copying:
            self._last = time.monotonic()
            for path in sorted(self.folder.rglob("*")):
                if not path.is_file() or path.suffix == ".tmp":
                    continue
                state = path.stat().st_size, path.stat().st_mtime_ns
                if self._sent.get(path) != state:
                    name = path.relative_to(self.folder).as_posix()
                    write_atomically(self._place / name, path.read_bytes())  # at once: it may grow meanwhile
                    self._sent[path] = state

    def copy_sometimes(self) -> None:
        """Copies in the background, at most every half a minute; a failure is logged, and tried again."""
        if self._temporary is None or time.monotonic() - self._last < _EVERY:
            return
        if self._thread is None or not self._thread.is_alive():
            self._last = time.monotonic()
            self._thread = threading.Thread(target=self._try, name="mirror", daemon=True)
            self._thread.start()

    def _try(self) -> None:
        try:
            self._copy()
        except errors() as error:
            _log.warning("%s: its metrics could not be copied (%s); tried again soon", self._place, reason(error))

    def close(self) -> None:
        """Copies what is left, logging a failure, and removes the local folder."""
        if self._temporary is not None:
            self._try()
            self._temporary.cleanup()
