"""Writes scalars for TensorBoard."""

import contextlib
import logging
import pathlib
import socket
import time
from typing import Any

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import RecordWriter

_log = logging.getLogger(__name__)


class TensorBoard:
    """Writes the scalars of records for TensorBoard, until the disk is full.

    tensorboardX's SummaryWriter writes in a thread, which a full disk ends; its queue then blocks the run for good.
    """

    def __init__(self, folder: pathlib.Path, first_step: int):
        self._writer: RecordWriter | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # A run that goes back opens another file, maybe in the same second: it would empty one of the same name.
            name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{time.monotonic_ns()}"
            self._writer = RecordWriter(str(folder / name))
        except OSError as error:
            _log.warning("%s cannot be written (%s): there is nothing for TensorBoard", folder, error.strerror)
        self._write(file_version="brain.Event:2")
        self._write(step=first_step + 1, session_log=SessionLog(status=SessionLog.START))  # later records are void

    def write(self, record: dict[str, Any]) -> None:
        """Writes a record, which holds "step"."""
        values = [
            Summary.Value(tag=name, simple_value=value)
            for name, value in record.items()
            if name != "step" and isinstance(value, (int, float))
        ]
        self._write(step=record["step"], summary=Summary(value=values))

    def close(self) -> None:
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.close()

    def _write(self, **fields: Any) -> None:
        if self._writer is None:
            return
        try:
            self._writer.write(Event(wall_time=time.time(), **fields).SerializeToString())
            self._writer.flush()
        except OSError:
            self.close()
            self._writer = None  # what follows half a record could not be read
