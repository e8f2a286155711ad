"""Draws runs side by side into one page: bigmac report RUN [RUN …] -o report.html."""

import jax
from absl import flags

from bigmac_jax.commands import cli
from bigmac_jax.report.page import write_page
from bigmac_jax.report.runs import read_runs
from bigmac_jax.runtime import storage

_OUTPUT = flags.DEFINE_string("output", "report.html", "Where the page is written.", short_name="o")


def main() -> None:
    jax.config.update("jax_platforms", "cpu")  # parameters are counted without a device
    path = storage.locate(_OUTPUT.value, "--output")
    runs = read_runs(cli.ARGUMENTS)
    write_page(runs, path)
    print(f"{path}: {len(runs)} run{'s' if len(runs) > 1 else ''}, {storage.file_size(path) / 1e6:.2f} MB")
