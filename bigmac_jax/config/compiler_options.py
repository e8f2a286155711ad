"""`execution.compiler_options`: options of XLA for the training step, as `name=value name=value`.

A saved config may come from anyone, so an option can't name a file: values are truth values and numbers, and a list of
words where XLA wants passes.
"""

import re

from bigmac_jax.config.errors import ConfigError

Value = bool | int | float | str
_TEXTS = ("xla_disable_hlo_passes", "xla_enable_hlo_passes_only")
_WRITES = "xla_dump"  # to files or to standard output


def parse_options(text: str) -> dict[str, Value]:
    """Reads options by name; raises ConfigError for what is none that may be set."""
    found: dict[str, Value] = {}
    for option in text.split():
        name, equals, value = option.partition("=")
        if not (equals and re.fullmatch(r"xla_\w+", name)):
            raise ConfigError(
                f"execution.compiler_options: {option!r} must be xla_NAME=VALUE, as in "
                "'xla_tpu_enable_async_all_to_all=false xla_gpu_dot_merger_threshold_mb=0'"
            )
        if name in found:
            raise ConfigError(f"execution.compiler_options has {name} twice; keep one")
        if name.startswith(_WRITES):
            raise ConfigError(
                f"execution.compiler_options: {name} writes files, which a config must not; set it in XLA_FLAGS"
            )
        found[name] = _parse_value(name, value)
    return found


def _parse_value(name: str, text: str) -> Value:
    if text in ("true", "false"):
        return text == "true"
    if re.fullmatch(r"-?\d{1,18}", text):
        return int(text)
    if re.fullmatch(r"-?\d{1,18}\.\d{1,18}", text):
        return float(text)
    if name in _TEXTS and re.fullmatch(r"[\w-]+(,[\w-]+)*", text):
        return text
    kind = "words between commas" if name in _TEXTS else "true, false or a number"
    raise ConfigError(f"execution.compiler_options: {name}={text!r} must be {kind}")
