"""Every flag of serve.py is on its page, and a value that cannot be is one line."""

import re

import pytest
from absl import flags
from absl.testing import flagsaver
from training.tools import ROOT

from bigmac_jax.commands import serve
from bigmac_jax.config import ConfigError


def test_every_flag_is_described() -> None:
    files = [ROOT / "bigmac_jax/commands" / name for name in ("serve.py", "decoding_flags.py")]
    flags = re.findall(r'flags\.DEFINE_\w+\(\s*"(\w+)"', "".join(file.read_text() for file in files))
    page = (ROOT / "docs/serving.md").read_text()
    assert len(flags) > 20 and {"arrival", "speculate", "port"} <= set(flags)
    assert not [flag for flag in flags if f"`--{flag}`" not in page]


@pytest.mark.parametrize("name", ["timeout", "arrival", "drain"])
def test_seconds_are_finite(name: str) -> None:
    holder = {"timeout": serve._TIMEOUT, "arrival": serve._ARRIVAL, "drain": serve._DRAIN}[name]
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    assert serve._seconds(holder) == holder.default
    for value in (float("inf"), float("nan")):
        with flagsaver.flagsaver((holder, value)), pytest.raises(ConfigError, match=f"^--{name}={value} must be a num"):
            serve._seconds(holder)


@pytest.mark.parametrize("host", ["a..b", "a" * 64 + ".b"])
def test_what_is_no_name_of_a_host(host: str) -> None:
    with pytest.raises(ConfigError, match=rf"^--host={host} --port=0 cannot be listened at \(.*; choose another$"):
        serve._listen(host, 0)
