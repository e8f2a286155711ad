"""What is compared: studies of conditions, each run with several seeds.

All runs are `configs/tiny.py` without shared experts, as in the paper: 64 experts, K = 8, dropless, as many tokens.
What all routed experts and projections of a layer have as parameters is equal, to the last one, where a condition does
not say otherwise: an expert of bigmac is a little narrower than the paper's, so that W↓ and W↑ are paid for, and where
outputs are gated, W_g is.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

SEEDS = (1, 2, 3)
Fields = dict[str, object]
EXPERTS, CHOICES = 64, 8
BASE: Fields = {
    "model.num_shared_experts": 0,
    "model.num_experts": EXPERTS,
    "model.top_k": CHOICES,
    "model.router_scale": 1.0,
    "train.checkpoint_every": 0,
    # As all but `selected` were run, whatever the defaults become.
    "model.projection_init": "random",
    "optimizer.projection_rate": 1.0,
}
# At 128 and 256 the best of those tried for fine_grained (the studies `rates`, `longer`, `rates 256`); at 64 twice as
# much is better (`width 64, longer`). 6e-3 is tiny's own. At 512 none was tried: half of 256's, as that is of 128's.
RATES = {64: 6e-3, 128: 6e-3, 256: 3e-3, 512: 1.5e-3}


@dataclass(frozen=True)
class Condition:
    """Attributes:
    name: in tables: structure, then what is said of its norm, its rate and so on.
    fields: of the config, beside BASE.
    seeds: the first where a rate is looked for, all where structures are compared.
    """

    name: str
    fields: Fields = field(hash=False)
    width: int = 128  # h
    steps: int = 1000
    seeds: tuple[int, ...] = SEEDS

    def overrides(self, seed: int) -> list[str]:
        of_width = {"model.hidden_size": self.width, "model.num_heads": self.width // 64}
        rate = {"optimizer.learning_rate": RATES[self.width]}
        of_run = {"train.steps": self.steps, "train.eval_every": self.steps // 4, "train.seed": seed}
        return [f"{name}={value}" for name, value in (BASE | of_width | rate | self.fields | of_run).items()]

    def key(self, seed: int) -> str:
        """Of its workdir."""
        name = self.name.replace(", ", "-").replace(" × ", "-").replace("/", "_").replace(" ", "-")
        return f"{name}-h{self.width}-{self.steps}-seed{seed}"


def fine_grained(width: int, norm: str = "none") -> Fields:
    """Experts of h → h/4 → h; a gate is paid for as bigmac's is."""
    fields: Fields = {"model.structure": "fine_grained", "model.down_ratio": 0.25, "model.latent_norm": norm}
    return fields | ({"model.expert_hidden_size": width // 4 - width // (2 * EXPERTS)} if norm == "gate" else {})


def bigmac(parts: int, width: int, norm: str = "none", more: int = 1) -> Fields:
    """r = 1/parts. `more` times as many experts and choices, each so much smaller.

    Experts of R → F → R, with F so that E·2·R·F + 2·R·h, and h·h of a gate, is fine_grained's E·2·h·h/4.
    """
    experts, gate = EXPERTS * more, norm == "gate"
    inner = width * (EXPERTS * parts // 4 - 1 - gate * parts // 2) // experts
    return {
        "model.structure": "bigmac",
        "model.down_ratio": 1 / parts,
        "model.expert_hidden_size": inner,
        "model.num_experts": experts,
        "model.top_k": CHOICES * more,
        "model.latent_norm": norm,
    }


def latent_moe(parts: int, width: int, norm: str = "none", more: int = 1) -> Fields:
    """LatentMoE (arXiv 2601.18089): experts keep fine_grained's inner width. `eff` is more = 1, `acc` more = parts."""
    return bigmac(parts, width, norm, more) | {"model.expert_hidden_size": width // 4}


SELECTS: Fields = {"model.projection_init": "selection", "optimizer.projection_rate": 1 / 8}
SELECTED = ", selected"
RATE = ", rate × "  # in names: before the learning rate over that of the width

# All of a width whose wire and experts differ.
STRUCTURES: dict[str, Callable[[int, str], Fields]] = {
    "fine_grained": fine_grained,
    "bigmac 1/2": functools.partial(bigmac, 2),
    "bigmac 1/4": functools.partial(bigmac, 4),
    "bigmac 1/8": functools.partial(bigmac, 8),
    "eff 1/4": functools.partial(latent_moe, 4),
    "acc 1/4": functools.partial(latent_moe, 4, more=4),
    "bigmac 1/2, twice": functools.partial(bigmac, 2, more=2),
}
# "both norms" and "learned factor" (docs/notes/quality.md) are runs of commit d8fd857, which has them.
NORMS = {"none": "", "pre_dispatch": ", norm before", "post_combine": ", norm", "skip": ", skip", "gate": ", gate"}


def normed(
    name: str, norm: str, width: int = 128, steps: int = 1000, seeds: tuple[int, ...] = SEEDS, selects: bool = False
) -> Condition:
    """`selects`: W↓ and W↑ start as a selection and are trained slowly."""
    fields = STRUCTURES[name](width, norm) | (SELECTS if selects else {})
    return Condition(name + NORMS[norm] + SELECTED * selects, fields, width, steps, seeds)


def _selected(width: int, steps: int) -> list[Condition]:
    pairs = [("bigmac 1/4", "skip"), ("bigmac 1/2", "skip"), ("bigmac 1/4", "gate")]
    return [normed(*pair, width, steps, selects=True) for pair in pairs]


def _projections() -> list[Condition]:
    """What W↓ and W↑ start as, and how fast they are trained: each alone, and both at several rates."""
    random, selected = (normed("bigmac 1/4", "skip", selects=selects) for selects in (False, True))
    return [
        normed("fine_grained", "none"),
        random,
        *(normed("bigmac 1/4", norm, selects=True) for norm in ("skip", "gate", "none")),
        *(_projections_at(selected, rate) for rate in (1, 1 / 2, 1 / 4, 1 / 16)),
        _projections_at(random, 1 / 8),
    ]


def _projections_at(condition: Condition, rate: float, seeds: tuple[int, ...] = SEEDS[:1]) -> Condition:
    """With W↓ and W↑ at another rate, over that of all else."""
    fields = condition.fields | {"optimizer.projection_rate": rate}
    return Condition(f"{condition.name}, projections × {rate:g}", fields, condition.width, condition.steps, seeds)


def _at_rates(
    conditions: list[Condition], factors: tuple[float, ...] = (0.5, 2.0), seeds: tuple[int, ...] = SEEDS[:1]
) -> list[Condition]:
    """At other learning rates than that of their width."""
    return [
        Condition(
            f"{c.name}{RATE}{factor:g}",
            c.fields | {"optimizer.learning_rate": RATES[c.width] * factor},
            c.width,
            c.steps,
            seeds,
        )
        for factor in factors
        for c in conditions
    ]


def _rates(width: int) -> list[Condition]:
    return _at_rates([normed("fine_grained", "none", width), normed("bigmac 1/4", "skip", width)])


def _rates_256() -> list[Condition]:
    """Twice the rate, that of narrower models, with all seeds: it was run first, and is too much."""
    fine = normed("fine_grained", "none", 256, 2500)
    skip, quarter, half = (
        normed(name, "skip", 256, 2500, selects=selects)
        for name, selects in (("bigmac 1/4", False), ("bigmac 1/4", True), ("bigmac 1/2", True))
    )
    return [fine, quarter, *_at_rates([fine, skip, quarter, half], (2.0,), SEEDS), *_at_rates([fine, quarter], (0.5,))]


def _longer() -> list[Condition]:
    """What is compared with all seeds; parts of the recipe and most rates with one."""
    compared = [("fine_grained", "none"), ("fine_grained", "post_combine"), ("bigmac 1/4", "skip"),
                ("bigmac 1/4", "gate"), ("bigmac 1/2", "skip")]  # fmt: skip
    parts = [("fine_grained", "gate"), ("bigmac 1/4", "none"), ("bigmac 1/4", "post_combine"), ("bigmac 1/2", "gate")]
    fine = normed("fine_grained", "none", steps=2400)
    selected = normed("bigmac 1/4", "skip", steps=2400, selects=True)
    return [
        *(normed(*pair, steps=2400) for pair in compared),
        *_selected(128, 2400),
        *(normed(*pair, steps=2400, seeds=SEEDS[:1]) for pair in parts),
        *_at_rates([selected], (1.5,), SEEDS),
        *_at_rates([selected], (2 / 3,)),
        *_at_rates([fine], (2 / 3, 1.5)),
        _projections_at(selected, 1 / 16),
    ]


def _of_width(width: int, steps: int) -> list[Condition]:
    compared = [("fine_grained", "none"), ("fine_grained", "post_combine"), ("bigmac 1/4", "skip"),
                ("bigmac 1/4", "gate"), ("bigmac 1/4", "none"), ("bigmac 1/2", "skip"),
                ("bigmac 1/2", "none")]  # fmt: skip
    return [normed(*pair, width, steps) for pair in compared] + _selected(width, steps)


def _longer_64() -> list[Condition]:
    fine = normed("fine_grained", "none", 64, 2400)
    skip, selected = (normed("bigmac 1/4", "skip", 64, 2400, selects=selects) for selects in (False, True))
    return [fine, skip, selected, *_at_rates([fine, selected], (2.0,), SEEDS)]


def _muon() -> list[Condition]:
    """Does an optimizer that makes W↓'s and W↑'s updates orthogonal change what the latent costs?"""
    muon: Fields = {"optimizer.name": "muon"}
    pairs = [("fine_grained", "none"), ("fine_grained", "post_combine"), ("bigmac 1/4", "skip"), ("bigmac 1/4", "gate")]
    compared = [normed(*pair, steps=2400) for pair in pairs] + _selected(128, 2400)
    compared.append(_projections_at(normed("bigmac 1/4", "skip", steps=2400, selects=True), 1, SEEDS))
    return [Condition(f"{c.name}, Muon", c.fields | muon, c.width, c.steps) for c in compared]


# configs/tiny.py as it is, but for how W↓ and W↑ start (BASE).
TINY: Fields = {
    "model.num_shared_experts": 1,
    "model.num_experts": 32,
    "model.top_k": 4,
    "model.router_scale": 2.0,
    "model.expert_hidden_size": 0,
}


def _balances() -> list[Condition]:
    kinds: dict[str, Fields] = {kind: {"model.balance": kind} for kind in ("aux_loss", "bias", "quantile", "none")}
    kinds["quantile of the same step"] = kinds["quantile"] | {"model.balance_step": "same"}
    return [Condition(f"tiny, balance {kind}", TINY | fields) for kind, fields in kinds.items()]


def _optimizers() -> list[Condition]:
    """Muon in as many steps as AdamW, and in three quarters of them, there at several rates."""
    muon: Fields = TINY | {"optimizer.name": "muon"}
    rates = {factor: muon | {"optimizer.learning_rate": RATES[128] * factor} for factor in (0.5, 2.0)}
    return [
        Condition("tiny, AdamW", TINY, steps=2400),
        Condition("tiny, Muon", muon, steps=1800),
        *(
            Condition(f"tiny, Muon, rate × {factor:g}", fields, 128, 1800, SEEDS[:1])
            for factor, fields in rates.items()
        ),
        Condition("tiny, Muon", muon, steps=2400),
        Condition("tiny, AdamW" + SELECTED, TINY | SELECTS, steps=2400),
    ]


# Study → conditions, in the order in which they answer: what was run for one study is not run again for another.
STUDIES: dict[str, list[Condition]] = {
    "norms": [normed("fine_grained", norm) for norm in ("none", "post_combine", "skip", "gate")]
    + [normed("bigmac 1/4", norm) for norm in NORMS],
    "projections": _projections(),
    "rates": _rates(128) + _rates(64),
    "balance": _balances(),
    "longer": _longer(),
    "muon": _muon(),
    "width 64": _of_width(64, 1000),
    "width 64, longer": _longer_64(),
    "ratios": [normed(name, norm) for name in STRUCTURES for norm in ("none", "skip")]
    + [normed(name, "skip", selects=True) for name in STRUCTURES if name != "fine_grained"],
    "optimizers": _optimizers(),
    "rates 256": _rates_256(),
    "width 256": _of_width(256, 2500),
}
