"""The cost model against published runs, and where a narrow exchange pays: the pages say what the model gives."""

import collections
import math
import pathlib
import statistics

import pytest

from benchmarks import pays, published
from bigmac_jax.planning.hardware import load_hardware
from bigmac_jax.planning.job import TERMS
from bigmac_jax.planning.published import Run, load_runs, predict_run

DOCS = pathlib.Path(__file__).parents[1] / "docs"
RUNS = load_runs()


def test_the_constants_are_the_best() -> None:
    """Of each kind of machine one, over the rows that are not set aside; a hundredth more or less is no better."""
    by_kind = collections.defaultdict[str, list[Run]](list)
    for run in RUNS:
        if not run.set_aside:
            by_kind[published.kind_of(run)].append(run)
    assert len(by_kind) == 5
    page = (DOCS / "planning-truth.md").read_text()
    for kind, runs in by_kind.items():
        (share,) = {round(_share_of_kind(of), 3) for of in runs}

        def miss(share: float, of_kind: list[Run] = runs) -> float:
            return statistics.fmean(abs(math.log(1 + published.error(of, share))) for of in of_kind)

        assert miss(share) <= min(miss(share - 0.01), miss(share + 0.01)) + 1e-9, kind
        assert f"| {kind} | {share:.2f}" in page


def _share_of_kind(run: Run) -> float:
    hardware = load_hardware(run.machine)
    return hardware.matmul_efficiency / (published.share_of(run, 1.0))


def test_the_page_says_what_the_model_gives() -> None:
    page = (DOCS / "planning-truth.md").read_text()
    for name, choose in published.GROUPS.items():
        for aside in (True, False):
            found = published.summary([published.error(run) for run in RUNS if choose(run) and run.set_aside == aside])
            label = ("set aside" if aside else "fitted to") + ("" if name == "all" else f", {name}")
            assert f"| {label} | {published._words(found)} |" in page
    aside = published.summary([published.error(run) for run in RUNS if run.set_aside])
    assert aside["median"] < 0.12 and aside["within_25"] > 0.8
    rows = (DOCS / "results" / "published.md").read_text()
    for run in RUNS:
        assert f"| {published._cell(run.row)}{' (aside)' if run.set_aside else ''} | {run.software} |" in rows
        assert f"| {run.measured() * (1 + published.error(run)):,.0f} | {published.error(run):+.0%} |" in rows, run.row


def test_terms_add_up() -> None:
    """A run's step is its terms, of which two are hidden in others."""
    for run in RUNS[::10]:
        times = predict_run(run)
        signs = {"hidden": -1, "hidden_sums": -1}
        total = sum(signs.get(term, 1) * getattr(times, term) for term in TERMS)
        assert times.total == pytest.approx(total) and all(getattr(times, term) >= 0 for term in TERMS)
        assert times.tokens_per_s / run.devices == pytest.approx(run.measured() * (1 + published.error(run)))


def test_a_term_that_is_left_out_is_missed() -> None:
    """Without the passes over memory every step is shorter, by what the page says of its rows."""
    runs = [run for run in RUNS if published.kind_of(run) == "v6e"]
    assert published.without("bubble", runs) is None  # no stage on TPU
    assert published.error(runs[0], without="memory") > published.error(runs[0])
    found = published.without("memory", runs)
    assert found and found["with"]["rows"] == found["without"]["rows"] == sum(run.set_aside for run in runs)
    assert found["with"]["mean"] != found["without"]["mean"]


@pytest.mark.full
def test_the_terms_of_the_page() -> None:
    page = (DOCS / "planning-truth.md").read_text()
    for term, what in (("memory", "memory: elementwise passes over memory"), ("tensor", "tensor: sequences over mesh")):
        found = published.without(term, RUNS)
        assert found
        a, b = found["with"], found["without"]
        cells = f"{a['rows']} | {a['median']:.1%} → {b['median']:.1%} | {a['within_25']:.0%} → {b['within_25']:.0%} |"
        (line,) = (line for line in page.splitlines() if line.startswith(f"| {what}"))
        assert line.endswith(cells)


def test_where_it_pays() -> None:
    page = (DOCS / "pays.md").read_text()
    for place in pays.places():
        share, times = pays.predicted(1, place).exchange_share, pays.gain(place)
        cells = (place.name, f"{place.bytes_a_flop:.1e}", f"{share:.0%}", f"{times:.2f}", pays.verdict(times))
        assert f"| {' | '.join(cells)} |" in page
    for found in pays.comparisons():
        assert f"| {found['measured']:.3f} | {found['predicted']:.3f} |" in page
        assert abs(found["predicted"] / found["measured"] - 1) < pays.ERROR


def test_slices_take_what_hosts_take() -> None:
    """Between two slices a message takes the latency of DCN, and rows may cross once for a slice."""
    slice_, slices = (place for place in pays.places() if place.name.endswith(("v6e:8x8", "v6e:4x8")))
    assert (slice_.latency, slices.latency) == (slice_.hardware.fast.latency, slice_.hardware.slow.latency)
    wide = pays.config(1, "hierarchical", 4, 2)
    times = pays.step_time(wide, pays.sizes(2), slices.hardware, slices.topology)
    assert pays.predicted(1, slices).total <= times.total
