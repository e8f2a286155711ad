"""Real servers on loopback, of this test session alone; each test has a folder of its own in the bucket."""

import os
import pathlib
from collections.abc import Iterator

import fsspec
import pytest

from benchmarks.stores import BUCKET, Server, gcs, s3


@pytest.fixture(scope="module")
def gs_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with gcs(tmp_path_factory.mktemp("gs")) as server, entered(server):
        yield server


@pytest.fixture(scope="module")
def s3_server() -> Iterator[Server]:
    with s3() as server, entered(server):
        yield server


class entered:  # noqa: N801  a context manager
    """The server's variables, in this process as well; without file systems that knew an earlier one."""

    def __init__(self, server: Server):
        self._server, self._patch = server, pytest.MonkeyPatch()

    def __enter__(self) -> None:
        for name, value in self._server.environment.items():
            self._patch.setenv(name, value)
        self._forget()

    def __exit__(self, *_: object) -> None:
        self._patch.undo()
        self._forget()

    @staticmethod
    def _forget() -> None:
        from etils.epath import backend

        backend.fsspec_backend._get_filesystem.cache_clear()
        fsspec.AbstractFileSystem.clear_instance_cache()
        for scheme in ("gs", "s3"):
            fsspec.get_filesystem_class(scheme).clear_instance_cache()


@pytest.fixture(params=["gs", pytest.param("s3", marks=pytest.mark.full)])
def place(request: pytest.FixtureRequest, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A URL to which nothing else writes; local copies go to a folder of the test."""
    request.getfixturevalue(f"{request.param}_server")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "local"))
    return f"{request.param}://{BUCKET}/{os.path.basename(tmp_path)}"
