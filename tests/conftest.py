"""Eight simulated CPU devices, strict rank promotion, exact matmuls."""

import gc
import importlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
import jax
import part
import pytest
from absl import flags

if jax.__version_info__[:2] == (0, 10):
    # Without the fusion emitters compiling takes half as long, and as one piece of code a sixth less. Later versions
    # have no such flags.
    flags_of_xla = ("--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1")
    os.environ["XLA_FLAGS"] = " ".join((os.environ.get("XLA_FLAGS", ""), *flags_of_xla))
# Programs take seconds to compile and milliseconds to run. Processes that tests start are told on their own: some
# compile for a TPU or a GPU, as users do.
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

# What jax traces and compiles stays, and looking through it again and again was 8 % of the time.
gc.freeze()
gc.set_threshold(50_000, 20, 50)


LONG = ("test_cli.py", "test_hosts.py", "test_resume.py")  # files that wait for processes, minutes each
MOST_BYTES = 1_000_000_000  # of compiled programs


def pytest_configure(config: pytest.Config) -> None:
    """Programs that another test, worker or run has compiled are read: about a tenth of a first run, a third of later
    ones. The key has the whole program, its options, and the versions of what compiles it."""
    if hasattr(config, "cache"):  # not with -p no:cacheprovider
        folder, name = config.cache.mkdir("programs"), os.environ.get("PYTEST_XDIST_WORKER", "main")
        if not hasattr(config, "workerinput"):
            files = [file for file in folder.parent.glob("programs*/*") if file.is_file()]
            if sum(file.stat().st_size for file in files) > MOST_BYTES:
                for file in files:  # a limit of JAX's own would be looked after at every write
                    file.unlink()
        jax.config.update("jax_compilation_cache_dir", str(folder))
        # Of what a worker's tests start. JAX says on stderr if it reads a program that another process writes just now.
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(config.cache.mkdir(f"programs-{name}"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", default="", metavar="N/M", help="of M parts of the tests, those of part N modulo M")
    parser.addoption("--order", default="", help="of the files: by a hash of this and their names")


def pytest_pycollect_makeitem(collector: Any, obj: Any) -> list[Any] | None:
    """A test of the full suite is not collected with its thousands of cases where all would be left out."""
    config, marks = collector.config, getattr(obj, "pytestmark", [])
    without = config.option.markexpr.startswith("not full and") and not any(
        "::" in argument for argument in config.args
    )
    return [] if without and isinstance(marks, list) and any(mark.name == "full" for mark in marks) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if wanted := config.getoption("--part"):
        number, parts = map(int, wanted.split("/"))
        others = [item for item in items if part.part_of(item.nodeid, parts) != number % parts]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if part.part_of(item.nodeid, parts) == number % parts]
    # With --no-loadscope-reorder workers take files in this order.
    if order := config.getoption("--order"):
        items.sort(key=lambda item: part.place_of(item.location[0], order))
    else:
        items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """Commands set what is logged; behind a test it is as before. One that leaves a mesh behind fails itself, not those
    that follow."""
    loggers = [logging.getLogger(name) for name in ("absl", "bigmac_jax")]
    before, mesh = [logger.level for logger in loggers], jax.sharding.get_abstract_mesh()
    yield
    for logger, level in zip(loggers, before, strict=True):
        logger.setLevel(level)
    assert jax.sharding.get_abstract_mesh() == mesh


@pytest.fixture
def command() -> Iterator[Callable[[str], Any]]:
    """Imports a program of `bigmac_jax.commands`; its flags, which others have as well, are gone behind the test."""
    importlib.import_module("bigmac_jax.commands.cli")  # what all share stays
    before, loaded = set(flags.FLAGS), set(sys.modules)
    yield lambda name: importlib.import_module(f"bigmac_jax.commands.{name}")
    for flag in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, flag)
    for module in set(sys.modules) - loaded:
        if module.startswith("bigmac_jax.commands."):
            del sys.modules[module]
            delattr(sys.modules["bigmac_jax.commands"], module.rpartition(".")[2])  # where imports look first


@pytest.fixture(scope="module")
def own_modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """transformers copies the code of a model to a folder, and imports it from there: one of the test file's own."""
    import transformers

    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("modules"))
        for module in (transformers.dynamic_module_utils, transformers.utils.hub):
            patch.setattr(module, "HF_MODULES_CACHE", folder)
        yield


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Torch's threads wait for each other longer than small models compute."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", autouse=True)
def _devices() -> None:
    assert len(jax.devices("cpu")) == 8
