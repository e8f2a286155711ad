"""The tables of the page: what each run came to, and where their configurations differ."""

from collections.abc import Callable, Iterable, Sequence
from html import escape
from statistics import fmean, median
from typing import Any

from bigmac_jax.config import DataConfig
from bigmac_jax.model.counts import parameters
from bigmac_jax.planning import units
from bigmac_jax.report.runs import Run
from bigmac_jax.report.series import clock
from bigmac_jax.training.drop_notice import MOST

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
NONE = "–"


def letter(index: int) -> str:
    """The letter of a run in the charts: A … Z, then numbers."""
    return LETTERS[index] if index < len(LETTERS) else str(index + 1)


def facts(run: Run) -> dict[str, str]:
    """The summary of a run in words and figures, by row."""
    last, model, planned = run.training[-1], run.config.model, run.config.train.steps
    scores = [r for r in run.evaluations if r.get("eval/perplexity") is not None]
    events, loss = [r["event"] for r in run.events], _show(last["loss"], "{:.4f}".format)
    return {
        "structure": model.structure,
        "layers × width": f"{model.depth} × {model.hidden_size}",
        "experts a layer, top-k": f"{model.expert_count}, top-{model.choices}" if model.is_moe else "dense",
        "parameters": _parameters(run),
        "steps": f"{last['step']:,}" + (f" of {planned:,}" if planned != last["step"] else ""),
        "tokens": _show(last.get("tokens"), units.count),
        "time of training steps": units.elapsed(3600 * clock(run.training)["hours"][-1]),
        "training loss, last": NONE if run.of_pairs else loss,
        "DPO loss of a pair, last": loss if run.of_pairs else NONE,
        **_scores(run, "perplexity", "{:.2f}"),
        **_scores(run, "bits per byte", "{:.4f}"),
        "windows by source": _by_source(last, "tokens/", lambda tokens, whole: f"{tokens / whole:.1%}"),
        "validation loss by source": _by_source(
            scores[-1] if scores else {}, "eval/loss/", lambda loss, _: f"{loss:.4f}"
        ),
        "tokens a second, median": _show(_over(run, "tokens_per_s", median), "{:,.0f}".format),
        "MFU, median": _show(_over(run, "mfu", median), "{:.1%}".format),
        "MFU with causal attention, median": _show(_over(run, "mfu_causal", median), "{:.1%}".format),
        "dropped choices, mean": _show(_over(run, "moe/drop_rate", fmean), _drop_rate),
        "moved choices, mean": _show(_over(run, "moe/moved_rate", fmean), "{:.2%}".format),
        "exchange a step": _show(last.get("moe/wire_bytes"), units.size),
        "device memory, peak": _show(_over(run, "memory/device_peak_bytes", max), units.size),
        "host memory, most": _show(_over(run, "memory/host_bytes", max), units.size),
        "bad steps": ", ".join(f"{events.count(e)} {e}" for e in sorted(set(events))) or "none",
    }


def _scores(run: Run, figure: str, form: str) -> dict[str, str]:
    """Rows of a figure of the validation text, of which less is better."""
    name = f"eval/{figure.replace(' ', '_')}"
    scores = [(r[name], r["step"]) for r in run.evaluations if r.get(name) is not None]
    last, best = f"validation {figure}, last", f"validation {figure}, best"
    if not scores:
        return {last: NONE, best: NONE}
    least, step = min(scores)
    return {last: form.format(scores[-1][0]), best: f"{form.format(least)} at step {step:,}"}


def _drop_rate(rate: float) -> str:
    return f"{rate:.2%}" + (" (model.capacity_factor=inf drops none)" if rate > MOST else "")


def summary(runs: Sequence[Run]) -> str:
    """HTML: a table of `facts`, a column for each run, without rows that no run has, and what they do not compare."""
    columns = [facts(run) for run in runs]
    rows = {name: [column[name] for column in columns] for name in columns[0]}
    table = _table(runs, "", {name: [escape(v) for v in row] for name, row in rows.items() if set(row) != {NONE}})
    return table + "".join(f"<p>{escape(note)}</p>" for note in notes(runs))


def notes(runs: Sequence[Run]) -> list[str]:
    """A line for each reason for which figures of the runs do not compare."""
    lettered = [(letter(i), run) for i, run in enumerate(runs)]
    scored = [(a, run) for a, run in lettered if run.evaluations]
    found = [
        (
            _groups(lettered, lambda data: data.tokenizer, "tokenizer"),
            "Tokenizers differ: {}. Bits per byte compare them; losses and perplexities, of a token, do not.",
        ),
        (
            _groups(scored, lambda data: data.validation_source or data.mixture or data.source, "validation"),
            "Validation texts differ: {}. No figure of validation compares them.",
        ),
        (
            _group((a, f"{run.config.data.sequence_length} {run.config.data.documents}") for a, run in scored),
            "Windows differ (data.sequence_length, data.documents): {}. Where more stands in front of a token, its "
            "validation loss is lower.",
        ),
        (
            _group((a, run.config.tuning.objective) for a, run in lettered),
            "Objectives differ: {}. Losses are over all tokens, over answers or of pairs, and do not compare.",
        ),
    ]
    return [line.format(" ≠ ".join(groups)) for groups, line in found if len(groups) > 1]


def _groups(lettered: Sequence[tuple[str, Run]], field: Callable[[DataConfig], str], name: str) -> list[str]:
    """The letters of runs of equal fingerprints; where not all are known, of an equal field."""
    known = all(name in run.fingerprints for _, run in lettered)
    return _group((a, run.fingerprints[name] if known else field(run.config.data)) for a, run in lettered)


def _group(values: Iterable[tuple[str, str]]) -> list[str]:
    """The letters that have the same value, a text for each value."""
    groups: dict[str, list[str]] = {}
    for a, value in values:
        groups.setdefault(value, []).append(a)
    return [" = ".join(letters) for letters in groups.values()]


def times(runs: Sequence[Run]) -> str:
    """An HTML table of where each run's time went, as seconds, shares and bars."""
    parts = dict.fromkeys(part for run in runs for part in run.seconds)
    rows = {part.replace("_", " "): [_share(run, part) for run in runs] for part in parts}
    return _table(runs, "", rows) if rows else "<p>These runs were made before it was counted.</p>"


def _share(run: Run, part: str) -> str:
    seconds = run.seconds.get(part, 0.0)
    share = f"{seconds / (sum(run.seconds.values()) or 1):.1%}"
    return f'{seconds:,.1f} s <small>{share}</small><div class="bar" style="width:{share}"></div>'


def differences(runs: Sequence[Run]) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
    """Config fields by name, a value a run: (those that differ between runs, those that do not)."""
    configs = [run.fields for run in runs]
    fields = {name: [config[name] for config in configs] for name in configs[0]}
    unequal = {name for name, values in fields.items() if any(value != values[0] for value in values)}
    return {n: v for n, v in fields.items() if n in unequal}, {n: v for n, v in fields.items() if n not in unequal}


def configuration(runs: Sequence[Run]) -> str:
    """HTML: the fields that differ, marked where they are not as in run A, and behind a fold those that don't."""
    different, equal = differences(runs)
    html = ""
    if different:
        marked = {
            name: [f"<strong>≠ {_value(v)}</strong>" if v != values[0] else _value(v) for v in values]
            for name, values in different.items()
        }
        html += f"<p>≠ marks what is not as in run {letter(0)}.</p>" + _table(runs, "differs", marked)
    elif len(runs) > 1:
        html += "<p>The runs have the same configuration.</p>"
    if equal:
        same = "the same in all runs" if len(runs) > 1 else f"of run {escape(runs[0].name)}"
        rows = {name: [_value(values[0])] for name, values in equal.items()}
        html += f"<details><summary>{len(equal)} fields, {same}</summary>{_table(runs[:0], '', rows)}</details>"
    return html


def _table(runs: Sequence[Run], kind: str, rows: dict[str, list[str]]) -> str:
    """An HTML table: a column of names, then one for each run, or without runs one of the value that all share."""
    heads = [
        f'<th scope="col"><span class="key run{i % 8}">{letter(i)}</span> {escape(run.name)}</th>'
        for i, run in enumerate(runs)
    ]
    head = "".join(heads or ['<th scope="col">value</th>'])
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        for name, cells in rows.items()
    )
    first = "field" if kind or not runs else "run"
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr><th scope="col">{first}</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _parameters(run: Run) -> str:
    count = parameters(run.config, {})
    active = "" if count.active == count.total else f", {units.count(count.active)} active"
    return units.count(count.total) + active


def _by_source(record: dict[str, Any], prefix: str, show: Any) -> str:
    """Writes what a record holds for each source of a mixture."""
    values = {name.removeprefix(prefix): v for name, v in record.items() if name.startswith(prefix) and v is not None}
    whole = sum(values.values()) or 1
    return ", ".join(f"{name} {show(value, whole)}" for name, value in values.items()) or NONE


def _value(value: Any) -> str:
    return escape(value if isinstance(value, str) and value else repr(value))


def _show(value: float | None, show: Callable[[float], str]) -> str:
    return NONE if value is None else show(value)


def _over(run: Run, name: str, function: Callable[[list[float]], float]) -> float | None:
    """`function` of a metric's values in training, if there are any."""
    values = [r[name] for r in run.training if r.get(name) is not None]
    return function(values) if values else None
