"""The files of a workdir beside checkpoints: config.json, run.json, copies of tokenizer and chat template."""

import contextlib
import dataclasses
import hashlib
import json
import logging
import pathlib
import secrets
import time
from collections.abc import Sequence
from typing import Any

from bigmac_jax.config import (
    TOKENIZER_SIZES,
    Config,
    ConfigError,
    missing_place_fix,
    parse_object,
    resume_notes,
    seal,
    unseal,
)
from bigmac_jax.data.chat_files import SETTINGS_FILE, ChatFiles, format_chat_files, read_chat
from bigmac_jax.data.chat_files import TEMPLATE_FILE as CHAT_TEMPLATE
from bigmac_jax.data.documents import log_once
from bigmac_jax.data.tokenizer import Tokenizer, load_tokenizer
from bigmac_jax.runtime import hosts
from bigmac_jax.runtime.environment import software_versions
from bigmac_jax.runtime.storage import check_inside, errors, is_store, locate, write_atomically
from bigmac_jax.training import manifest
from bigmac_jax.training.optimizer import optimizer_notes

_CONFIG, _RUN = "config.json", "run.json"
_PARTS = {"data": str, "mesh": int, "edition": str}  # of run.json, and the type of their values
_STEPS = "accumulate_steps"  # the key in run.json of the parts of a batch that were trained with
_TOKENIZERS = ("tokenizer.json", "tokenizer.model")
_HUB = (
    "a model's name on the Hub is not downloaded: hf download {place} --local-dir {name}, then bigmac convert import "
    "--checkpoint={name} --workdir=runs/{name}"
)
_LATE = 10.0  # seconds after which a file that another process has written must be seen


def has_run(workdir: pathlib.Path) -> bool:
    """Whether something was trained there."""
    return (workdir / _CONFIG).exists() or bool(manifest.list_steps(workdir))


def locate_workdir(place: str) -> pathlib.Path:
    """The path of --workdir.

    Raises:
      ConfigError: no path, one that the disk refuses, or on a store that takes no checkpoints.
    """
    if place.startswith("s3://"):
        raise ConfigError(
            f"--workdir={place} can't be on S3, where Orbax writes no checkpoints; use a local disk or gs:// for it "
            f"(data, cache_dir and exports may be on s3://)"
        )
    if not place:
        raise ConfigError("--workdir is empty; give a folder")
    path = locate(place, "--workdir")
    try:
        if not is_store(path):
            path.exists()
    except OSError as error:  # too long, or in a folder that may not be entered
        raise ConfigError(f"--workdir={place} cannot be used ({error.strerror}); give another one") from None
    return path


def read_config(workdir: pathlib.Path) -> Config:
    """Reads the config that a workdir was trained with. Where config.json is gone, or is not what the run wrote, the
    newest checkpoint's is taken, with a line that says so.

    Raises:
      ConfigError: there is none.
    """
    file = workdir / _CONFIG
    fix = "; bring back what the run wrote, or start a new workdir"
    try:
        content = file.read_bytes()
        config = Config.from_json(content, str(file))
        if _read_run(workdir).get("config", digest := hashlib.sha256(content).hexdigest()) == digest:
            return config
        problem = f"{file} has changed since the run wrote it"
    except FileNotFoundError:
        problem = f"--workdir={workdir} holds no {_CONFIG}"
        fix = f"; {missing_place_fix(str(workdir), 'give the workdir of a training run', hub=_HUB)}"
    except OSError as error:
        if is_store(file):  # a moment without it damages nothing
            raise
        problem = f"{file} cannot be read ({error.strerror})"
    except ConfigError as error:
        problem, fix = str(error), ""  # it has its own
    for step in reversed(manifest.list_steps(workdir)):
        checkpoint = workdir / "checkpoints" / str(step)
        if manifest.find_damage(checkpoint, thorough=False):
            continue
        with contextlib.suppress(OSError, ConfigError):
            saved = Config.from_json((checkpoint / "config" / "metadata").read_bytes())
            log_once(logging.WARNING, f"{problem}; the config of checkpoint {step} is taken")
            return saved
    raise ConfigError(f"{problem}{fix}")


def check_shared(workdir: pathlib.Path) -> None:
    """Checks that all processes see this folder, and not one of the same name each.

    Raises:
      ConfigError: on all of them, which process does not see it.
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
    if hosts.is_first():
        note.unlink(missing_ok=True)
    if "0" in sees:
        raise ConfigError(
            f"process {sees.index('0')} does not see what process 0 writes into --workdir={workdir}; give one that all "
            f"of them share"
        )


def use_saved_tokenizer(workdir: pathlib.Path, config: Config) -> Config:
    """The config with the workdir's copy of the tokenizer, which outlives the text, file or package that it came from.

    Without a copy the config names the place of one: what a saved config names is not looked for elsewhere. A config
    that names another tokenizer than the run's, or one that needs no file, stays.

    Raises:
      ConfigError: the copy has changed, or is a link to something outside of the workdir.
    """
    name = config.data.tokenizer
    file = next((file for file in _TOKENIZERS if (workdir / file).is_file()), "")
    if read_config(workdir).data.tokenizer != name or (not file and name in TOKENIZER_SIZES):
        return config
    kept, known = check_inside(workdir, file or _TOKENIZERS[0]), read_run_json(workdir)["data"].get("tokenizer")
    if file and known and known != hashlib.sha256(kept.read_bytes()).hexdigest():
        raise ConfigError(f"{kept} is not the tokenizer that the run was trained with; bring back a good copy")
    return dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=str(kept)))


def use_saved_template(workdir: pathlib.Path, config: Config, of_user: bool = False) -> Config:
    """The config with the workdir's copies of the chat template and of special tokens' names, where there are any and
    it names no other template.

    Args:
      of_user: the config is the user's, and not what the workdir has saved: without a copy, its template is read.
    """
    own, given = workdir / CHAT_TEMPLATE, config.tuning.chat_template
    if not of_user or (workdir / SETTINGS_FILE).is_file():
        config = use_saved_tokenizer(workdir, config)
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


def load_run_tokenizer(workdir: pathlib.Path, config: Config) -> Tokenizer:
    """Loads the tokenizer that the run was trained with, or that the config names instead; errors as for
    `use_saved_tokenizer`, and where the workdir has no copy."""
    own = use_saved_tokenizer(workdir, config)
    if own.data.tokenizer == str(workdir / _TOKENIZERS[0]) and not (workdir / _TOKENIZERS[0]).is_file():
        raise ConfigError(
            f"{workdir} holds no {' or '.join(_TOKENIZERS)}, and data.tokenizer={config.data.tokenizer} of its config "
            f"is not looked for elsewhere; copy it there"
        )
    return load_tokenizer(own)


def write_config(config: Config, workdir: pathlib.Path, **of_run: Any) -> None:
    """Writes config.json, which makes the directory a workdir; `of_run` is added to run.json."""
    content = config.to_json().encode()
    values = _read_run(workdir) | of_run | {"config": hashlib.sha256(content).hexdigest()}
    _write(workdir / _CONFIG, content)
    _write(workdir / _RUN, (json.dumps(seal(values), indent=2, allow_nan=False) + "\n").encode())


def write_run(
    workdir: pathlib.Path,
    config: Config,
    data: dict[str, str],
    mesh: dict[str, int],
    tokenizer: Tokenizer,
    chat: ChatFiles,
    history: Sequence[str] | None,
    parts: int,
) -> None:
    """Writes config, tokenizer and chat template, and in run.json the run's data, mesh, parts, code and packages.

    Args:
      data: fingerprints by name: tokenizer, and splits and models that were opened.
      mesh: ranks by axis.
      history: what the model had learned before, of a run that begins; None leaves what is there.
      parts: of a batch, on that mesh; 0: as many as the config says.
    """
    known = read_run_json(workdir)["data"]  # of a validation split, which not every start reads
    if tokenizer.file:
        _write(workdir / tokenizer.file, tokenizer.content)
    for name, content in format_chat_files(chat).items():
        _write(workdir / name, content)
    of_run = {"mesh": mesh, _STEPS: parts or config.train.accumulate_steps}
    of_run |= {} if history is None else {"history": list(history)}
    write_config(config, workdir, data=known | data, edition=software_versions(), **of_run)


def read_run_json(workdir: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Reads from run.json the fingerprints of `data`, the `mesh`, and the `edition` of code and packages; what is not
    known, or of another type, is left out."""
    found = _read_run(workdir)
    groups = {name: group if isinstance(group := found.get(name), dict) else {} for name in _PARTS}
    return {
        name: {key: value for key, value in group.items() if isinstance(value, _PARTS[name])}
        for name, group in groups.items()
    }


def read_history(workdir: pathlib.Path) -> list[str] | None:
    """Reads from run.json what the model had learned before the run (`training.history`); None if that is not known."""
    found = _read_run(workdir).get("history")
    return [str(entry) for entry in found] if isinstance(found, list) else None


def resume_warnings(workdir: pathlib.Path, config: Config, mesh: dict[str, int], step: int) -> list[str]:
    """A line for each way in which the rest of a run may differ by more than rounding from what it would have been."""
    saved, before = read_config(workdir), read_run_json(workdir)["mesh"] or mesh
    parts = _read_run(workdir).get(_STEPS)  # of fewer replicas than the config asks for (`run.elastic`) there are more
    if isinstance(parts, int) and parts > 0:
        saved = dataclasses.replace(saved, train=dataclasses.replace(saved.train, accumulate_steps=parts))
    notes = resume_notes(saved, config, before, mesh) + optimizer_notes(saved, config, step)
    return notes + software_changes(workdir)


def software_changes(workdir: pathlib.Path) -> list[str]:
    """A line if this is other code, or these are other packages, than what last trained the run."""
    before, now = read_run_json(workdir)["edition"], software_versions()
    changed = [
        f"{name} {before[name]} → {now.get(name, 'none')}" for name in before if before[name] != now.get(name, "none")
    ]
    return [f"{workdir} was trained with other software ({', '.join(changed)}); numbers may differ"] if changed else []


def _read_run(workdir: pathlib.Path) -> dict[str, Any]:
    """All of run.json; {} if there is none."""
    file = workdir / _RUN
    try:
        return unseal(parse_object(file.read_bytes()))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{file} cannot be read ({error}); bring back a good copy, or remove it: then nobody can tell whether the "
            f"run's data and tokenizer are still what they were"
        ) from None


def _write(file: pathlib.Path, content: bytes) -> None:
    """Writes a file whole or not at all."""
    try:
        write_atomically(file, content)
    except OSError as error:
        if is_store(file):
            raise
        raise ConfigError(f"{file} cannot be written ({error.strerror}); remove what is there, or free space") from None
