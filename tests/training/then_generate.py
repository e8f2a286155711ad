"""train.py, whose processes then complete prompts together, into WORKDIR.jsonl: then_generate.py ARGUMENTS…"""

import dataclasses
import json
import pathlib
import runpy
import sys
from typing import Any

from bigmac_jax.config import Config
from bigmac_jax.inference import Generator, Request, Sampling
from bigmac_jax.run import loop
from bigmac_jax.runtime import hosts
from bigmac_jax.tuning import restore

REQUESTS = [
    Request("the state of the", Sampling(max_tokens=6, ignore_eos=True)),
    Request("law", Sampling(max_tokens=3, temperature=1.0, seed=3, ignore_eos=True)),
    Request("peace and war", Sampling(max_tokens=5, ignore_eos=True)),
]


def complete(config: Config, workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Three prompts in two rows, on the current mesh."""
    config, model = restore(workdir, config=config)
    done = Generator(config, model, 64, batch_size=2).generate(REQUESTS)
    return [dataclasses.asdict(completion) for completion in done]


def main() -> None:
    sys.argv[0] = "train.py"
    train = loop.train

    def then(config: Config, workdir: pathlib.Path, *arguments: Any) -> loop.Result:
        result = train(config, workdir, *arguments)
        done = complete(config, workdir)
        if hosts.is_first():
            workdir.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in done))
        return result

    loop.train = then
    runpy.run_path("train.py", run_name="__main__")


if __name__ == "__main__":
    main()
