"""A worker of benchmarks.peers.programs: MaxText's training step, compiled by its own ahead-of-time compiler for a TPU
slice that is not there, in an environment of its own (Python 3.12 or later; benchmarks.peers says which packages).

Started as python -m benchmarks.peers.maxtext_program FILE name=value …, which are MaxText's settings. FILE gets the
scheduled program, FILE.json its memory and versions.
"""

import os
import pathlib
import sys
import time

os.environ["DECOUPLE_GCLOUD"] = "TRUE"  # before the import: no Google Cloud clients
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import importlib.metadata
import json

import maxtext
from maxtext.trainers.pre_train import train_compile

SETTINGS = {
    "run_name": "peers",
    "compile_topology_num_slices": 1,
    "dataset_type": "synthetic",
    "tokenizer_type": "huggingface",
    "enable_checkpointing": False,
    "enable_goodput_recording": False,
    "skip_jax_distributed_system": True,
    "dtype": "bfloat16",
    "weight_dtype": "float32",
    "attention": "flash",
}


def main() -> None:
    file, given = pathlib.Path(sys.argv[1]), dict(setting.split("=", 1) for setting in sys.argv[2:])
    base = pathlib.Path(maxtext.__file__).parent / "configs" / "base.yml"
    plain = train_compile.jit_and_compile
    start = time.perf_counter()

    def keep(*arguments: object, **keywords: object) -> object:
        compiled = plain(*arguments, **keywords)
        memory = compiled.memory_analysis()
        file.write_text(compiled.as_text())
        found = {
            "memory": memory.peak_memory_in_bytes + memory.generated_code_size_in_bytes,
            "seconds": round(time.perf_counter() - start, 1),
            "versions": {name: importlib.metadata.version(name) for name in ("maxtext", "jax", "libtpu")},
        }
        file.with_suffix(".json").write_text(json.dumps(found, allow_nan=False))
        return compiled

    train_compile.jit_and_compile = keep
    train_compile.main(["", str(base), *(f"{name}={value}" for name, value in (SETTINGS | given).items())])


if __name__ == "__main__":
    main()
