"""What is compared: studies of conditions, each run with several seeds.

All runs are `configs/tiny.py` as the quality studies have it (no shared experts, 64 experts, K = 8) with a capacity
factor of 1.25, so that drops show; all see as many tokens, of a BPE that was trained on all domains alike.
"""

import pathlib
from dataclasses import dataclass

from benchmarks.distributions.domains import ABOUT
from benchmarks.quality.grid import BASE, RATES, SEEDS, bigmac, fine_grained

WIDTH = 128
CAPACITY = 1.25
STRUCTURES = {
    "fine_grained": fine_grained(WIDTH),
    "bigmac": bigmac(4, WIDTH),
    "recipe": bigmac(4, WIDTH, "post_combine"),  # docs/quality.md
    "skip": bigmac(4, WIDTH, "skip"),
    "control": fine_grained(WIDTH, "post_combine"),
}
BALANCES = ("aux_loss", "bias", "quantile", "none")


@dataclass(frozen=True)
class Condition:
    """Attributes:
    trained: domains with their weights, and after half of the steps those of `then`, if it is not empty.
    """

    structure: str
    trained: tuple[str, ...]
    then: tuple[str, ...] = ()
    balance: str = "aux_loss"
    steps: int = 1000

    @property
    def name(self) -> str:
        shift = f" → {'+'.join(self.then)}" if self.then else ""
        balance = "" if self.balance == "aux_loss" else f", balance {self.balance}"
        return f"{self.structure}: {'+'.join(self.trained)}{shift}{balance}"

    def key(self, seed: int) -> str:
        """Of its workdir."""
        name = self.name.replace(": ", "-").replace(" → ", "-to-").replace(", balance ", "-").replace("+", "-")
        return f"{name}-{self.steps}-seed{seed}"

    def overrides(self, seed: int, folder: pathlib.Path) -> list[str]:
        steps = self.steps
        mixture = ",".join(f"{folder / name}.jsonl={int(name in self.trained)}" for name in ABOUT)
        then = ",".join(f"{name}=1" for name in self.then)
        fields = BASE | STRUCTURES[self.structure] | {
            "model.hidden_size": WIDTH, "model.num_heads": WIDTH // 64, "model.balance": self.balance,
            "model.capacity_factor": CAPACITY, "optimizer.learning_rate": RATES[WIDTH],
            "data.mixture": mixture, "data.curriculum": f"{steps // 2}:{then}" if then else "",
            "data.tokenizer": folder / "tokenizer.json", "train.steps": steps, "train.seed": seed,
            "train.log_every": max(1, steps // 100), "train.eval_every": steps // (4 if then else 1),
        }  # fmt: skip
        return [f"{name}={value}" for name, value in fields.items()]


ALL = tuple(ABOUT)


def _alone(structures: tuple[str, ...], *domains: str) -> list[Condition]:
    return [Condition(structure, (name,)) for structure in structures for name in domains]


# Study → conditions, in the order in which they answer.
STUDIES: dict[str, list[Condition]] = {
    "shift": [Condition("recipe", ("old",), ("code",), balance) for balance in BALANCES]
    + [Condition(s, ("old",), ("code",)) for s in ("fine_grained", "bigmac")],
    "balance": [Condition("recipe", ALL, balance=balance) for balance in BALANCES if balance != "none"],
    "transfer": [Condition(s, trained) for s in ("recipe", "fine_grained") for trained in (("old",), ("code",), ALL)]
    + [Condition("skip", ("old",))],
    "norm": [Condition("control", ("old",))],
    "more": [
        *_alone(("bigmac",), "old", "code"),
        Condition("bigmac", ALL),
        Condition("recipe", ALL, balance="none"),
        Condition("recipe", ("old",), ("new",)),
        *_alone(("recipe", "fine_grained", "bigmac"), "new", "languages"),
    ],
}
__all__ = ["ALL", "SEEDS", "STRUCTURES", "STUDIES", "Condition"]
