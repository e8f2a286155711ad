"""Every flag of serve.py is on its page, and a value that cannot be is one line."""

import re

import pytest
from training.tools import ROOT

from bigmac_jax.config import ConfigError
from bigmac_jax.serving.limits import finite_seconds
from bigmac_jax.serving.server import listen


def test_every_flag_is_described() -> None:
    files = [ROOT / "bigmac_jax/commands" / name for name in ("serve.py", "decoding_flags.py")]
    flags = re.findall(r'flags\.DEFINE_\w+\(\s*"(\w+)"', "".join(file.read_text() for file in files))
    page = (ROOT / "docs/serving.md").read_text()
    assert len(flags) > 20 and {"arrival", "speculate", "port"} <= set(flags)
    assert not [flag for flag in flags if f"`--{flag}`" not in page]


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_seconds_are_finite(value: float) -> None:
    assert finite_seconds("drain", 0.5) == 0.5
    with pytest.raises(ConfigError, match=f"^--drain={value} must be a number of seconds, as 30$"):
        finite_seconds("drain", value)


@pytest.mark.parametrize("host", ["a..b", "a" * 64 + ".b"])
def test_what_is_no_name_of_a_host(host: str) -> None:
    with pytest.raises(ConfigError, match=rf"^--host={host} --port=0 cannot be listened at \(.*; choose another$"):
        listen(host, 0)
