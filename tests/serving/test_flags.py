"""Every flag of serve.py is on its page."""

import re

from training.tools import ROOT


def test_every_flag_is_described() -> None:
    files = [ROOT / "bigmac_jax/commands" / name for name in ("serve.py", "decoding_flags.py")]
    flags = re.findall(r'flags\.DEFINE_\w+\(\s*"(\w+)"', "".join(file.read_text() for file in files))
    page = (ROOT / "docs/serving.md").read_text()
    assert len(flags) > 20 and {"arrival", "speculate", "port"} <= set(flags)
    assert not [flag for flag in flags if f"`--{flag}`" not in page]
