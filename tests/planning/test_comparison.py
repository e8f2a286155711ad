"""--compare: structures at an equal loss, by hand; the data file is the quality study's; what has no loss says so."""

import json
import math
import pathlib
from typing import Any

import pytest

from benchmarks.quality import fit
from bigmac_jax.config import Config, ConfigError, load_config
from bigmac_jax.model.counts import parameters
from bigmac_jax.planning import comparison
from bigmac_jax.planning.candidates import Machine
from bigmac_jax.planning.comparison import Measured, compare, gap, studied_name, tokens_factor
from bigmac_jax.planning.hardware import load_hardware
from bigmac_jax.planning.search import fastest
from bigmac_jax.planning.structures import CONTROL, alternatives
from planning.test_planner import plan, shown

ROOT = pathlib.Path(__file__).parents[2]
SHIPS = ("mesh.expert=8", "model.latent_norm=skip", "model.projection_init=selection")


def test_the_data_file_is_made_from_the_runs() -> None:
    runs = json.loads((ROOT / "docs/results/unrepeated.json").read_text())["runs"]
    assert (ROOT / fit.PATH).read_text() == fit.text(runs)


def test_gaps_by_hand() -> None:
    """Pairs of equal seeds, 0.2, 0.4 and 0.3, whose error is 0.1 / √3; two seeds are too few. The two longest lengths
    with three seeds of fine_grained say the slope: 0.7 nats of ln 2."""

    def run(name: str, steps: int, seed: int, loss: float, width: int = 128) -> dict[str, Any]:
        return {"name": name, "width": width, "steps": steps, "seed": seed, "loss": loss, "tokens": 2048 * steps}

    fresh = [run("fine_grained", steps, seed, loss) for steps, loss in ((1000, 5.0), (2000, 4.3)) for seed in (1, 2, 3)]
    fresh += [run("fine_grained", 4000, 1, 4.0)]
    fresh += [run("r = 1/4", 2000, seed, loss) for seed, loss in ((3, 4.5), (1, 4.7), (2, 4.6))]
    fresh += [run("control", 2000, seed, 4.0) for seed in (1, 2)]
    (fitted,) = fit.gaps(fresh)
    assert fitted[:3] == (("bigmac 1/4", "fine_grained"), 128, 4_096_000)
    assert fitted[3:] == pytest.approx((0.3, 0.1 / math.sqrt(3)))
    # An error of 0.10 says that it has learnt what the others have not.
    fresh += [run("r = 1/4", 1000, seed, loss) for seed, loss in ((3, 5.0), (1, 5.1), (2, 4.75))]
    assert fit.gaps(fresh) == [fitted]
    fresh += [run("fine_grained", 3000, seed, 4.0 + 0.1 * seed) for seed in (1, 3, 5)]
    assert fit.longest(fresh) == (1000, 2000)
    assert fit.slope(fresh, (1000, 2000)) == pytest.approx((0.7 / math.log(2), 0))


def test_a_gap_in_tokens_by_hand() -> None:
    """0.1 nats of 0.5 an e-fold are e^0.2 of the tokens; errors of 0.01 and 0.05 are 0.02 each, together √2 · 0.02."""
    found = tokens_factor(Measured(0.1, 0.01), Measured(0.5, 0.05))
    assert found == pytest.approx((math.exp(0.2), math.exp(0.2) * math.sqrt(2) * 0.02))
    assert tokens_factor(Measured(0.0, 0.01), Measured(0.5, 0.05)) == pytest.approx((1.0, 0.02))
    assert tokens_factor(Measured(-0.1, 0.0), Measured(0.5, 0.0)) == pytest.approx((math.exp(-0.2), 0.0))
    assert Measured(1.05, 0.02).differs(1.0) and not Measured(0.97, 0.02).differs(1.0)
    assert not Measured(1.5, 0.25).differs(1.0)  # two errors are no difference, but more are


def test_the_nearest_width_and_a_line_between_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Halfway in ln tokens between 1 and 4 M: the mean of 0.1 and 0.3, with half of each error."""

    def row(width: int, tokens: float, nats: float, error: float, *structures: str) -> dict[str, Any]:
        return {"structures": structures, "width": width, "tokens": tokens, "nats": nats, "error": error}

    pair = "bigmac 1/4", "fine_grained"
    rows = [row(128, 4e6, -0.3, 0.04, *reversed(pair)), row(128, 1e6, 0.1, 0.03, *pair), row(256, 1e6, 0.5, 0.1, *pair),
            row(128, 1e6, 0.2, 0.01, CONTROL, "bigmac 1/4")]  # fmt: skip
    monkeypatch.setattr(comparison, "study", lambda: {"gap": rows})

    def found(*asked: Any) -> tuple[float, ...]:
        of = gap(*asked)
        assert of
        return (*of.behind, of.width)

    assert found(*pair, 96, 2e6) == pytest.approx((0.2, 0.025, 128))
    assert found(*pair, 96, 1e6) == pytest.approx((0.1, 0.03, 128)) == found(*pair, 128, 10)
    assert found(*pair, 128, 4e6) == pytest.approx((0.3, 0.04, 128)) == found(*pair, 128, 1e12)
    assert found(*reversed(pair), 4096, 1e6) == pytest.approx((-0.5, 0.1, 256))
    assert found("bigmac 1/4", CONTROL, 4096, 1e6) == pytest.approx((-0.2, 0.01, 128))
    assert gap("", "fine_grained", 128, 1e6) is None
    # Outside is what was not measured of the pair itself.
    asked = [(96, 2e6), (128, 2e6), (128, 4e6), (128, 5e6), (128, 9e5), (200, 1e6), (300, 1e6)]
    assert [gap(*pair, *of).extrapolated for of in asked] == [True, False, False, True, True, False, True]
    assert gap("bigmac 1/4", CONTROL, 200, 1e6).extrapolated and gap(*pair, 96, 2e6).tokens == (1e6, 4e6)


def test_time_to_a_loss_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """e^0.2 of the tokens in steps of half the time: 0.61 of it; the configured one takes 10 steps of 4 s."""
    row = {"structures": ["bigmac 1/4", "fine_grained"], "width": 128, "tokens": 10**6, "nats": 0.1, "error": 0.01}
    known = {"models": "small ones", "slope": {"nats": 0.5, "error": 0.05}, "gap": [row]}
    monkeypatch.setattr(comparison, "study", lambda: known)
    config = load_config("tiny", ["model.structure=fine_grained", "data.batch_size=10", "data.sequence_length=100"])
    ours = load_config("tiny", ["model.down_ratio=0.25"]).model
    steps = {"fine_grained": (config.model, 4.0), "bigmac": (ours, 2.0), "dense": "no mesh"}
    found = compare(config, steps, 10_000)
    own, other, none = found["structures"]
    assert own == {"structure": "fine_grained", "step": 4.0, "seconds": 40.0} and none["error"] == "no mesh"
    assert tuple(other["time_factor"].values()) == pytest.approx(
        (0.5 * math.exp(0.2), 0.5 * math.exp(0.2) * math.sqrt(2) * 0.02)
    )
    assert other["differs"] and other["seconds"] == pytest.approx(20 * math.exp(0.2))
    assert other["extrapolated"] and found["extrapolated"]  # the row is of 10^6 tokens
    assert not compare(config, steps, 10**6)["extrapolated"]
    # What does not fit itself is no measure of the others.
    own, *others = compare(config, {**steps, next(iter(steps)): "does not fit"}, 10_000)["structures"]
    assert own["error"] == "does not fit" and "seconds" not in own
    assert all(row["error"] == "it has nothing to be compared with" for row in others if "step" in row)


def test_structures_of_a_plan() -> None:
    made = plan(overrides=SHIPS, devices=8, hardware="h100", compare=True, tokens="1B")
    rows = {row["structure"]: row for row in made["compare"]["structures"]}
    half, twice = "bigmac, r = 1/2", "bigmac, r = 1/4, twice the experts"
    assert list(rows) == ["bigmac", half, twice, "fine_grained", CONTROL, "vanilla", "dense"]
    assert rows[half]["step"] > rows["bigmac"]["step"] and "error" not in rows[twice]
    assert rows["bigmac"]["step"] == made["time"]["total"]
    assert rows["fine_grained"]["step"] == made["baselines"]["fine_grained"]["time"]["total"]
    assert rows["dense"]["error"] == "its loss was not measured" and "4 ranks" in rows["vanilla"]["error"]
    control = rows[CONTROL]
    ratio = control["step"] / rows["bigmac"]["step"]
    assert control["time_factor"]["value"] == pytest.approx(ratio * control["tokens_factor"]["value"])
    assert 0 < control["tokens_factor"]["value"] < 1 and made["compare"]["extrapolated"]
    text = shown(made)
    assert "EXTRAPOLATED: this is h = 2,048 with 1.00 B tokens, beyond what was measured of bigmac, r = 1/2; " in text
    assert "h = 128, 5.12 M" in text and "no shared experts" in text
    assert "slower, by" in text and "than its error" in text and "1.00 B tokens" in text


@pytest.mark.full
def test_with_a_search_each_has_its_own_mesh() -> None:
    """So `vanilla`, whose four experts the plan's eight ranks don't divide, has one; the first is the plan's."""
    made = plan(overrides=SHIPS, devices=8, hardware="h100", compare=True, search=True)
    rows = {row["structure"]: row for row in made["compare"]["structures"]}
    assert rows["bigmac"]["step"] == made["time"]["total"] and rows["vanilla"]["step"] > 0
    other = load_config(f"{ROOT}/configs/paper/gpt3_xl.py", ("model.structure=fine_grained",))
    best = fastest(other, Machine(8, load_hardware("h100")))
    assert rows["fine_grained"]["step"] == best[0].times.total


def test_a_control_has_the_others_beside_it() -> None:
    config = load_config(
        f"{ROOT}/configs/paper/gpt3_xl.py",
        ["model.structure=fine_grained", "model.latent_norm=post_combine", "model.projection_init=selection"],
    )
    assert list(alternatives(config)) == [CONTROL, "bigmac", "fine_grained", "vanilla", "dense"]
    found = alternatives(config, studied=True)
    half, twice = "bigmac, r = 1/2", "bigmac, r = 1/4, twice the experts"
    assert list(found) == [CONTROL, "bigmac", half, twice, "fine_grained", "vanilla", "dense"]
    made = {name: other for name, other in found.items() if isinstance(other, Config)}
    assert made[CONTROL] is config and made[half].model.latent_size == 2 * made["bigmac"].model.latent_size
    assert studied_name(made[twice].model, config.model) == "bigmac 1/4, twice"
    assert studied_name(made[half].model, config.model) == "bigmac 1/2"
    one, more = made["bigmac"].model, made[twice].model
    assert (more.expert_count, more.choices) == (2 * one.expert_count, 2 * one.choices)
    sizes = [parameters(of, {}).total for of in made.values() if of.model.structure != "dense"]
    assert max(sizes) < 1.02 * min(sizes)
    norms = {name: other.model.latent_norms for name, other in found.items() if not isinstance(other, ConfigError)}
    assert norms["fine_grained"] == () and norms["bigmac"] == ("skip", "post_combine")


@pytest.mark.parametrize(
    ("overrides", "request_", "part"),
    [
        (("model.structure=dense",), {"hardware": "h100"}, "no loss of model.structure=dense; use bigmac"),
        (("model.latent_norm=none",), {"hardware": "h100"}, "latent_norm=none, projection_init=random; use"),
        ((*SHIPS, "model.down_ratio=0.125"), {"hardware": "h100"}, r"down_ratio=0\.125, latent_norm=skip"),
        (("model.structure=fine_grained", "model.latent_norm=gate"), {"hardware": "h100"}, "latent_norm=gate; use"),
        (SHIPS, {}, "--compare needs the time of a step; add --hardware=NAME"),
    ],
)
def test_what_cannot_be_compared_is_one_line(overrides: tuple[str, ...], request_: dict[str, str], part: str) -> None:
    with pytest.raises(ConfigError, match=part) as error:
        plan(overrides=overrides, compare=True, **request_)
    assert "\n" not in str(error.value)


def test_names_of_the_study() -> None:
    def name(*overrides: str) -> str:
        return studied_name(load_config("tiny", overrides).model)

    assert [name(), name("model.down_ratio=0.5"), name("model.projection_init=random")] == [
        "bigmac 1/4",
        "bigmac 1/2",
        "",
    ]
    fine = "model.structure=fine_grained"
    assert [name(fine), name(fine, "model.latent_norm=post_combine"), name(fine, "model.latent_norm=skip")] == [
        "fine_grained", CONTROL, "",
    ]  # fmt: skip
