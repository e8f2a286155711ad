"""Decoding with the cache beside recomputing the prefix and transformers' generate: python -m benchmarks.decode.

The model of configs/nemotron.py (the size of configs/tiny.py) with random parameters, batch 16; transformers gets the
exported model, in an environment of its own. Rounds alternate, one computes at a time. JSON lines: new tokens a second
of each; the median over rounds of each one's time over ours. And the picture docs/images/decode.png: milliseconds of
each step and memory, by the number of tokens that have been generated.

    python -m benchmarks.peers --setup      first: makes the environment of transformers
    python -m benchmarks.decode
"""

from bigmac_jax import environment

environment.prepare()

import contextlib  # noqa: E402
import json  # noqa: E402
import pathlib  # noqa: E402
import statistics  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402

import jax  # noqa: E402
import numpy as np  # noqa: E402
from absl import flags  # noqa: E402

from benchmarks.peers.worker import Worker  # noqa: E402
from benchmarks.timing import alternate, median_ratio, summary  # noqa: E402
from bigmac_jax import cli  # noqa: E402
from bigmac_jax.config import load_config  # noqa: E402
from bigmac_jax.data.tokenizer import ByteTokenizer  # noqa: E402
from bigmac_jax.inference import Generator  # noqa: E402
from bigmac_jax.interchange import export_model  # noqa: E402
from bigmac_jax.mesh import token_spec  # noqa: E402
from bigmac_jax.model.transformer import init_model  # noqa: E402
from bigmac_jax.report import plots  # noqa: E402
