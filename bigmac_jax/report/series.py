"""A run's records as what the page draws: curves, a clock, expert loads; thinned where there are thousands.

n records, Y layers, E experts.
"""

import base64
import math
from typing import Any

import numpy as np

from bigmac_jax.report.runs import Records, Run

POINTS = 1000  # of a curve: more than a chart has pixels
CELLS = 200_000  # bytes of a run's heat map
COLUMNS = 120  # of it at most
_LONGEST, _MOST = 1e9, 2.0**62  # seconds of a step, and tokens; a damaged record may say anything


def chart_data(run: Run) -> dict[str, Any]:
    """JSON for the page's charts. Every curve is over steps; `clock` says which tokens and hours a step had."""
    renamed = {"loss": "dpo/loss"} if run.of_pairs else {}
    series = {renamed.get(key, key): curve for key, curve in curves(run.training).items()}
    return {
        "name": run.name,
        "clock": clock(run.training),
        "series": series | curves(run.evaluations),
        "events": [{"step": r["step"], "event": r["event"]} for r in run.events],
        "load": expert_load(run.training),
    }


def curves(records: Records) -> dict[str, dict[str, list[Any]]]:
    """key → {"step", "value"} of each scalar: at most `POINTS` points that hold its extremes, fractions to 6 digits."""
    names = {k: None for r in records for k, v in r.items() if _is_number(v)}
    series = {}
    for name in (n for n in names if n not in ("step", "tokens")):
        having = [r for r in records if name in r]
        values_n = np.asarray([r[name] if _is_number(r[name]) else np.nan for r in having], float)
        kept = thin(values_n, POINTS)
        series[name] = {
            "step": [having[i]["step"] for i in kept],
            "value": [_short(float(values_n[i])) for i in kept],
        }
    return series


def thin(values_n: np.ndarray, points: int) -> list[int]:
    """Chooses at most `points` indices: both ends, and of each stretch the smallest value, the largest and a NaN."""
    n = len(values_n)
    if n <= points:
        return list(range(n))
    kept = {0, n - 1}
    for stretch in np.array_split(np.arange(n), (points - 2) // 3):
        finite = stretch[~np.isnan(values_n[stretch])]
        kept |= set(stretch[np.isnan(values_n[stretch])][:1].tolist())
        if len(finite):
            kept |= {int(finite[values_n[finite].argmin()]), int(finite[values_n[finite].argmax()])}
    return sorted(kept)


def clock(records: Records) -> dict[str, list[float]]:
    """Steps, tokens and hours of training, from 0; hours leave out evaluations, checkpoints and undone steps."""
    steps_n = np.asarray([0] + [r["step"] for r in records], float).clip(0, _MOST)
    seconds_n = np.asarray([r.get("step_time_s") or 0.0 for r in records], float).clip(0, _LONGEST)
    hours_n = np.concatenate([[0.0], np.cumsum(seconds_n * np.diff(steps_n))]) / 3600
    tokens_n = np.asarray([0] + [r.get("tokens") or 0 for r in records], float).clip(0, _MOST)
    kept = np.unique(np.linspace(0, len(records), min(len(records) + 1, POINTS)).round().astype(int))
    return {
        "step": steps_n[kept].astype(int).tolist(),
        "tokens": tokens_n[kept].astype(int).tolist(),
        "hours": [_short(float(h)) for h in hours_n[kept]],
    }


def expert_load(records: Records) -> dict[str, Any] | None:
    """Each expert's load over the mean (1 = balanced), by layer and time; None for a dense run.

    Returns:
      layers, experts, `step` of the last record of each column, `max`, and `cells`: base64 of one byte a value, layer
      by layer and expert by expert, load = max · (byte / 255)²: small loads keep their digits. A column is the mean of
      its records.
    """
    having = [r for r in records if r.get("moe/load")]
    having = [r for r in having if np.shape(r["moe/load"]) == np.shape(having[-1]["moe/load"])]
    if not having:
        return None
    load_nYE = np.asarray([r["moe/load"] for r in having], float)
    n, layers, experts = load_nYE.shape
    columns = min(n, max(16, min(COLUMNS, CELLS // (layers * experts))))
    stretches = np.array_split(np.arange(n), columns)
    mean_cYE = np.stack([np.nan_to_num(load_nYE[stretch]).mean(0) for stretch in stretches]).clip(0)
    largest = max(float(mean_cYE.max()), 1.0)
    byte_YEc = np.sqrt(mean_cYE.transpose(1, 2, 0) / largest) * 255
    return {
        "layers": layers,
        "experts": experts,
        "step": [having[stretch[-1]]["step"] for stretch in stretches],
        "max": largest,
        "cells": base64.b64encode(byte_YEc.round().astype(np.uint8).tobytes()).decode(),
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _short(value: float) -> float | None:
    if math.isnan(value):
        return None
    return int(value) if value.is_integer() else float(f"{value:.6g}")
