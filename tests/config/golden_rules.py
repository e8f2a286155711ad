"""What every rule of the config says of thousands of values: python -m tests.config.golden_rules writes
tests/config/golden_rules.txt.

A line is a field, and each value that it is set to with a letter for each config of `BASES`: x is refused, and a digit
is how many notes a run would print (fields that nothing reads, and the like). Behind them are pairs of drawn fields.
"""

import pathlib
import random
from collections.abc import Iterator

from bigmac_jax.config import Config, ConfigError, check_batch, load_config, with_overrides
from bigmac_jax.config.reads import notes
from bigmac_jax.config.section import FieldType, all_field_types

ROOT = pathlib.Path(__file__).parents[2]
FILE = pathlib.Path(__file__).with_suffix(".txt")
BASES = (
    ("tiny", ()),
    ("tiny", ("model.structure=dense", "mesh.expert=1", "train.steps=8", "optimizer.warmup_steps=8")),
    ("modern", ("mesh.tensor=2", "mesh.expert=4", "execution.exchange=dedup", "execution.overlap_chunks=2")),
    ("tiny", ("train.init_from=x", "tuning.lora_rank=8", "model.router=hyper", "model.latent_norm=none")),
    ("hybrid", ("model.mtp_modules=1", "execution.remat=offload", "optimizer.name=muon")),
)
NUMBERS = {
    int: ("0", "1", "2", "7", "8", "64"),
    float: ("0", "1e-9", "0.125", "0.5", "0.996", "1", "1.25", "inf"),
    bool: ("true", "false"),
}
PAIRS = 400


def values(kind: FieldType) -> tuple[str, ...]:
    return (*kind.choices, *NUMBERS.get(kind.kind, () if kind.choices else ("", "x")))


def lines() -> Iterator[str]:
    bases = [load_config(f"{ROOT}/configs/{name}.py", overrides) for name, overrides in BASES]
    fields = all_field_types(Config)
    for name, kind in fields.items():
        said = {value: "".join(verdict(config, f"{name}={value}") for config in bases) for value in values(kind)}
        yield f"{name}: " + " ".join(f"{value}={letters}" for value, letters in said.items())
    draw = random.Random(0)
    for number in range(PAIRS):
        config = draw.randrange(len(bases))
        pair = [f"{name}={draw.choice(values(fields[name]))}" for name in draw.sample(list(fields), 2)]
        yield f"{number} {config} {' '.join(pair)} {verdict(bases[config], *pair)}"


def verdict(config: Config, *overrides: str) -> str:
    try:
        changed = with_overrides(config, overrides)
        check_batch(changed, changed.mesh.data if changed.mesh.data > 0 else 2)
    except ConfigError:
        return "x"
    return str(len(notes(changed, [text.partition("=")[0] for text in overrides], base=config)))


if __name__ == "__main__":
    FILE.write_text("\n".join(lines()) + "\n")
