"""What a workdir says of its run beside checkpoints: its config, its tokenizer, and what these alone do not tell."""

import contextlib
import dataclasses
import hashlib
import json
import logging
import pathlib
import secrets
import time
from typing import Any

from bigmac_jax.config import (
    TOKENIZER_SIZES,
    Config,
    ConfigError,
    DataConfig,
    parse_object,
    resume_notes,
    sealed,
    unsealed,
)
from bigmac_jax.data.chat_files import NO_CHAT, SETTINGS_FILE, ChatFiles, format_chat_files, read_chat
from bigmac_jax.data.chat_files import TEMPLATE_FILE as CHAT_TEMPLATE
from bigmac_jax.data.corpus import has_splits, open_documents
from bigmac_jax.data.documents import log_once
from bigmac_jax.data.pipeline import Stream, open_stream
from bigmac_jax.data.tokenizer import Tokenizer, load_tokenizer
from bigmac_jax.runtime import hosts
from bigmac_jax.runtime.environment import software_versions
from bigmac_jax.runtime.storage import check_inside, errors, is_store, locate, write_atomically
from bigmac_jax.training import manifest

_log = logging.getLogger(__name__)
_CONFIG, _RUN = "config.json", "run.json"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model")
_LATE = 10.0  # seconds after which a file that another process has written must be seen
_APART = 60.0  # seconds that clocks may differ by
# Fields that name where data lies; they may change as long as what lies there does not.
_PLACES = {"train": "source", "tokenizer": "tokenizer", "validation": "validation_source"}


def has_run(workdir: pathlib.Path) -> bool:
    """Whether something was trained there."""
    return (workdir / _CONFIG).exists() or bool(manifest.steps(workdir))


def run_folder(place: str) -> pathlib.Path:
    """The path of --workdir.

    Raises:
      ConfigError: no path, or on a store that takes no checkpoints.
    """
    if place.startswith("s3://"):
        raise ConfigError(
            f"--workdir={place} can't be on S3, where Orbax writes no checkpoints; use a local disk or gs:// for it "
            f"(data, cache_dir and exports may be on s3://)"
        )
    return locate(place, "--workdir")


def read_config(workdir: pathlib.Path) -> Config:
    """The config that a workdir was trained with; its newest checkpoint's, with a line that says so, where config.json
    is gone or is not what the run wrote.

    Raises:
      ConfigError: there is none.
    """
    file, problem = workdir / _CONFIG, ""
    try:
        content = file.read_bytes()
        if _read_run(workdir).get("config", digest := hashlib.sha256(content).hexdigest()) != digest:
            problem = f"{file} has changed since the run wrote it"
        config = Config.from_json(content, str(file))
    except FileNotFoundError:
        problem = f"--workdir={workdir} holds no {_CONFIG}"
    except OSError as error:
        if is_store(file):  # a moment without it damages nothing
            raise
        problem = f"{file} cannot be read ({error.strerror})"
    except ConfigError as error:
        problem = str(error)
    if not problem:
        return config
    for step in reversed(manifest.steps(workdir)):
        checkpoint = workdir / "checkpoints" / str(step)
        if manifest.damage(checkpoint, thorough=False):
            continue
        try:
            saved = Config.from_json((checkpoint / "config" / "metadata").read_bytes())
        except (OSError, ConfigError):  # of an earlier version
            continue
        if (workdir, problem) not in _said:
            _said.add((workdir, problem))
            _log.warning("%s; the config of checkpoint %d is taken", problem, step)
        return saved
    raise ConfigError(problem if file.exists() else f"{problem}; give the workdir of a training run")


_said: set[tuple[pathlib.Path, str]] = set()  # a start reads the config more than once


def check_shared(workdir: pathlib.Path) -> None:
    """Whether all processes see this folder and not one of the same name each, and have about the same time.

    Raises:
      ConfigError: on all of them, which process does not.
    """
    if not hosts.is_distributed():
        return
    note = workdir / ".seen"
    with hosts.raise_together():
        word = secrets.token_hex(8) if hosts.is_first() else ""
        if hosts.is_first():
            note.write_text(word)
    word = hosts.broadcast(word)
    seen, end = False, time.monotonic() + _LATE
    while not seen and time.monotonic() < end:
        with contextlib.suppress(*errors()):
            seen = note.read_text() == word
        time.sleep(0 if seen else 0.2)
    sees = hosts.gather(str(int(seen)))
    clocks = [float(clock) for clock in hosts.gather(str(time.time()))]
    if hosts.is_first():
        note.unlink(missing_ok=True)
    if "0" in sees:
        raise ConfigError(
            f"process {sees.index('0')} does not see what process 0 writes into --workdir={workdir}; give one that all "
            f"of them share"
        )
    early, late = (clocks.index(pick(clocks)) for pick in (min, max))
    if clocks[late] - clocks[early] > _APART and hosts.is_first():
        _log.warning(
            "the clock of process %d is %.0f s ahead of that of process %d; times in logs and files will mislead",
            late, clocks[late] - clocks[early], early,
        )  # fmt: skip


def with_own_tokenizer(workdir: pathlib.Path, config: Config, of_user: bool = False) -> Config:
    """The config with the workdir's copy of the tokenizer, which stays what it was whatever becomes of the corpus that
    it was trained on, or of the file or package that it came from. As it is where it names another one than the run's,
    or needs no file. Without a copy it names the place of one: what a saved config names is not looked for elsewhere.

    Args:
      of_user: the config is the user's, and not what the workdir has saved: without a copy, as of an earlier version,
        it says where the tokenizer comes from.

    Raises:
      ConfigError: the copy has changed, or is a link to something outside of the workdir; or, of the user's config,
        there is none, and it can't be made again.
    """
    name = config.data.tokenizer
    if read_config(workdir).data.tokenizer != name:
        return config
    file = next((file for file in _TOKENIZERS if (workdir / file).is_file()), "")
    wanted, kept = _fingerprint(workdir), check_inside(workdir, file or _TOKENIZERS[0])
    if file and wanted not in ("", hashlib.sha256(kept.read_bytes()).hexdigest()):
        raise ConfigError(f"{kept} is not the tokenizer that the run was trained with; bring back a good copy")
    if file or not (of_user or name in TOKENIZER_SIZES):
        return dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=str(kept)))
    if wanted and wanted != load_tokenizer(config).fingerprint:
        raise ConfigError(
            f"data.tokenizer={name} is not the one that {workdir} was trained with, of which there is no copy: what it "
            f"is made from has changed; bring that back"
        )
    return config


def with_own_template(workdir: pathlib.Path, config: Config, of_user: bool = False) -> Config:
    """The config with the workdir's copies of the chat template and of special tokens' names, if there are any, and it
    doesn't name another template.

    Args:
      of_user: the config is the user's, and not what the workdir has saved: without a copy, its template is read.
    """
    own, given = workdir / CHAT_TEMPLATE, config.tuning.chat_template
    if (workdir / SETTINGS_FILE).is_file():
        config = with_own_tokenizer(workdir, config, of_user)
    if not own.is_file():
        if given and not of_user:
            line = (
                f"tuning.chat_template={given} of the config of {workdir} is not read; copy it to {own} if it should be"
            )
            log_once(logging.WARNING, line)
            given = ""
    elif given in ("", read_config(workdir).tuning.chat_template) or (
        read_chat(given, "", "tuning.chat_template").template == check_inside(workdir, CHAT_TEMPLATE).read_text()
    ):
        given = str(check_inside(workdir, CHAT_TEMPLATE))
    return dataclasses.replace(config, tuning=dataclasses.replace(config.tuning, chat_template=given))


def run_tokenizer(workdir: pathlib.Path, config: Config, of_user: bool = False) -> Tokenizer:
    """The tokenizer that the run was trained with, or that the config names instead; arguments and errors as for
    `with_own_tokenizer`, and it must be there."""
    own = with_own_tokenizer(workdir, config, of_user)
    if own.data.tokenizer == str(workdir / _TOKENIZERS[0]) and not (workdir / _TOKENIZERS[0]).is_file():
        raise ConfigError(
            f"{workdir} holds no {' or '.join(_TOKENIZERS)}, and data.tokenizer={config.data.tokenizer} of its config "
            f"is not looked for elsewhere; copy it there, or resume the run once with train.py, which keeps a copy"
        )
    return load_tokenizer(own)


def _fingerprint(workdir: pathlib.Path) -> str:
    """Of the run's tokenizer; "" if it is not known."""
    return run_of(workdir)["data"].get("tokenizer", "")


def write_config(config: Config, workdir: pathlib.Path, **of_run: Any) -> None:
    """Makes the directory a workdir; each file appears whole or not at all.

    of_run: what run.json holds besides; it keeps the rest.
    """
    content = config.to_json().encode()
    values = _read_run(workdir) | of_run | {"config": hashlib.sha256(content).hexdigest()}
    _write(workdir / _CONFIG, content)
    _write(workdir / _RUN, (json.dumps(sealed(values), indent=2, allow_nan=False) + "\n").encode())


def write_run(
    workdir: pathlib.Path,
    config: Config,
    data: dict[str, str],
    mesh: dict[str, int],
    tokenizer: Tokenizer,
    chat: ChatFiles = NO_CHAT,
) -> None:
    """Writes the config, the tokenizer, what is known of dialogues, and in run.json what the run is of: data, mesh,
    code and packages.

    Args:
      data: fingerprints by name: tokenizer, train, and validation if there is one.
      mesh: ranks by axis.
    """
    known = run_of(workdir)["data"]  # of a validation split, which not every start reads
    data = _of_own_files(config) | data
    if tokenizer.file:
        _write(workdir / tokenizer.file, tokenizer.content)
    for name, content in format_chat_files(chat).items():
        _write(workdir / name, content)
    write_config(config, workdir, data=known | data, mesh=mesh, edition=software_versions())


def check_data(workdir: pathlib.Path, config: Config, data: dict[str, str]) -> None:
    """Whether a run goes on with the data that it was started with, wherever that lies now.

    Raises:
      ConfigError: it would not, or can't be told because an earlier version started it.
    """
    saved, known = read_config(workdir).data, run_of(workdir)["data"]
    for place in ("validation_source", "test_source"):
        if bool(getattr(saved, place)) != bool(getattr(config.data, place)):
            # What has no source of its own is held out of data.source, which is then another text.
            before, now = getattr(saved, place), getattr(config.data, place)
            raise ConfigError(
                f"data.{place}={now!r} differs from {before!r}, which this workdir was started with, and decides what "
                f"is held out of data.source; keep {before!r}, or use a new --workdir"
            )
    for name, place in _PLACES.items():
        before, now = getattr(saved, place), getattr(config.data, place)
        if name in known and name in data:
            if known[name] != data[name]:
                text = f"mixture={config.data.mixture}" if config.data.mixture else f"source={config.data.source}"
                where = f"data.{text}" if name == "train" else f"the {name} split of data.{text}"
                where = f"data.{place}={now}" if now and name != "train" else where
                raise ConfigError(
                    f"{where} holds other data than this workdir was started with; bring that back, or use a new "
                    f"--workdir"
                )
        elif before != now and not (name == "validation" and name not in data):
            raise ConfigError(
                f"data.{place}={now!r} differs from {before!r}, which this workdir was started with, and its run.json "
                f"has nothing to compare the data by; keep {before!r}, or use a new --workdir"
            )


def run_stream(workdir: pathlib.Path, config: Config, split: str, tokenizer: Tokenizer) -> Stream:
    """The tokens of a split of the run's data.

    Raises:
      ConfigError: it is not there any more, or holds other text than when the run was trained.
    """
    check_split(workdir, config, split)
    return open_stream(with_own_template(workdir, config), split, tokenizer)


def name_data(workdir: pathlib.Path, config: Config, split: str) -> None:
    """Says in a line where a split of the run's data is read, which the workdir's config names."""
    data, own = config.data, f"{split}_source"
    field = own if getattr(data, own, "") else "mixture" if data.mixture else "source"
    if (place := getattr(data, field)) != DataConfig.source and hosts.is_first():
        _log.info("the %s split is read from data.%s=%s, which the config of %s names", split, field, place, workdir)


def check_split(workdir: pathlib.Path, config: Config, split: str) -> None:
    """Raises ConfigError if a split of the run's data holds other text than when the run was trained."""
    known, data, name = run_of(workdir)["data"], config.data, split
    if split not in known and not getattr(data, f"{split}_source", ""):
        name = "train"  # which it was held out of
    if name in known and known[name] != open_documents(data, name, config.cache_dir).fingerprint:
        place = _PLACES.get(split, f"{split}_source")
        place = place if split != "train" and getattr(data, place) else "mixture" if data.mixture else "source"
        where = f"data.{place}={getattr(data, place)}"
        raise ConfigError(
            f"{where} holds other data than {workdir} was trained with, so its {split} split is another; bring that "
            f"back, or score a text with --text_file"
        )


def changes_of_loss(workdir: pathlib.Path, config: Config, mesh: dict[str, int]) -> list[str]:
    """A line for each way in which the rest of a run may differ by more than rounding from what it would have been."""
    saved, known = read_config(workdir), run_of(workdir)["mesh"]
    if not known:  # of an earlier version
        known = mesh | {axis: getattr(saved.mesh, axis) for axis in mesh if getattr(saved.mesh, axis)}
    return resume_notes(saved, config, known, mesh) + changes_of_edition(workdir)


def _read_run(workdir: pathlib.Path) -> dict[str, Any]:
    """{} of an earlier version, which had none; its first ones have no seal."""
    file = workdir / _RUN
    try:
        found = parse_object(file.read_bytes())
        if found.keys() <= {"data", "mesh"} and all(isinstance(part, dict) for part in found.values()):
            return found
        return unsealed(found)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{file} cannot be read ({error}); bring back a good copy, or remove it: then nobody can tell whether the "
            f"run's data and tokenizer are still what they were"
        ) from None


def changes_of_edition(workdir: pathlib.Path) -> list[str]:
    """A line if this is other code, or these are other packages, than what last trained the run."""
    before, now = run_of(workdir)["edition"], software_versions()
    changed = [
        f"{name} {before[name]} → {now.get(name, 'none')}" for name in before if before[name] != now.get(name, "none")
    ]
    return [f"{workdir} was trained with other software ({', '.join(changed)}); numbers may differ"] if changed else []


def run_of(workdir: pathlib.Path) -> dict[str, dict[str, Any]]:
    """run.json: fingerprints of `data`, the `mesh`, and the `edition` of code and packages; what is not known, or is
    not what it should be, is left out."""
    found = _read_run(workdir)
    parts = {"data": str, "mesh": int, "edition": str}
    groups = {name: found.get(name) for name in parts}
    return {
        name: {key: value for key, value in group.items() if isinstance(value, parts[name])}
        if isinstance(group, dict)
        else {}
        for name, group in groups.items()
    }


def _of_own_files(config: Config) -> dict[str, str]:
    """Fingerprints of the held-out splits that have files of their own, which training may not look at."""
    found = {}
    for split in ("validation", "test"):
        source = getattr(config.data, f"{split}_source")
        if source and not has_splits(source):
            with contextlib.suppress(ConfigError):  # evaluation will say what is wrong with it
                found[split] = open_documents(config.data, split, config.cache_dir).fingerprint
    return found


def _write(file: pathlib.Path, content: bytes) -> None:
    """Whole or not at all."""
    try:
        write_atomically(file, content)
    except OSError as error:
        if is_store(file):
            raise
        raise ConfigError(f"{file} cannot be written ({error.strerror}); remove what is there, or free space") from None
