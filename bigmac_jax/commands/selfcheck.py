"""Says whether this machine computes what it should, and how fast: bigmac selfcheck (docs/selfcheck.md).

bigmac selfcheck --cpu_devices=2 --quick
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import flags
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bigmac_jax.commands import cli
from bigmac_jax.config import ConfigError, strict_json
from bigmac_jax.planning.hardware import load_hardware
from bigmac_jax.runtime import environment, hosts
from bigmac_jax.selfcheck import checks
from bigmac_jax.selfcheck.host import host_checks
from bigmac_jax.selfcheck.rates import Rate, all_rates, find_hardware

_JSON = flags.DEFINE_bool("json", False, "Print one JSON object and nothing else.")
_QUICK = flags.DEFINE_bool("quick", False, "Leave the rates out.")


def main() -> int:
    """Runs all checks, prints a table or JSON, and returns the exit code: 1 if a check failed."""
    if cli.OVERRIDES:
        raise ConfigError(f"--config.{cli.OVERRIDES[0]}: the self-check has models of its own; drop it")
    report: dict[str, Any] = {"versions": environment.software_versions(), "device": device()}
    if not _JSON.value and hosts.is_first():
        _show_machine(report)
    report["rates"] = {}
    name = report["device"]["hardware"]
    hardware = load_hardware(name) if name else None
    to_run = [*host_checks(jax.local_devices(), hardware), *checks.all_checks(jax.devices())]
    if not _QUICK.value:
        rates = all_rates(jax.devices(), hardware)
        to_run += [_as_check(rate, report["rates"]) for rate in rates]
    results = [_run(check) for check in to_run]
    report["checks"] = [
        {"name": r.check.name, "ok": r.ok, "why": r.why, "seconds": round(r.seconds, 2), "part": r.check.part}
        | {"detail": r.detail, "setting": r.check.setting}
        for r in results
    ]
    report["ok"] = all(r.ok for r in results)
    report["advice"] = checks.advice(results)
    if _JSON.value:
        hosts.say(strict_json(report))
    elif hosts.is_first():
        _show(report, results)
    return 0 if report["ok"] else 1


def device() -> dict[str, Any]:
    """Describes jax.devices(), and names their hardware file."""
    first = jax.local_devices()[0]
    return {
        "platform": first.platform,
        "kind": first.device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "memory_bytes": (first.memory_stats() or {}).get("bytes_limit"),
        "hardware": find_hardware(first.device_kind),
        "compiler_options": environment.compiler_options(first),
    }


def _run(check: checks.Check) -> checks.Result:
    """Runs a check after saying which: on new hardware one may hang."""
    console = Console(stderr=True)
    if not console.is_terminal:
        hosts.say(f"{check.name} …", sys.stderr)
        return checks.run(check)
    with console.status(check.name):
        return checks.run(check)


def _as_check(rate: Rate, found: dict[str, Any]) -> checks.Check:
    """Makes a check that measures a rate, and adds it to `found`."""

    def measure() -> str:
        value = rate.measure()
        share = value / rate.expected if rate.expected else None
        found[rate.name] = {"value": value, "unit": rate.unit + "/s", "expected": rate.expected, "share": share}
        return f"{_scaled(value)}{rate.unit}/s a device" + (
            f", {share:.0%} of the hardware file's {_scaled(rate.expected)}" if share and rate.expected else ""
        )

    return checks.Check(f"rate {rate.name}", "rate", "", measure)


def _scaled(value: float) -> str:
    """Three digits with a unit: 12.3 T."""
    for factor, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {letter}"
    return f"{value:.3g} "


def _show_machine(report: Mapping[str, Any]) -> None:
    console, it = Console(highlight=False), report["device"]
    memory = f", {it['memory_bytes'] / 2**30:.1f} GiB" if it["memory_bytes"] else ""
    console.print(", ".join(f"{name} {version}" for name, version in report["versions"].items()))
    console.print(
        f"[bold]{it['devices']} × {it['kind']}[/bold] ({it['platform']}{memory}), {it['processes']} process(es)"
    )
    console.print(f"hardware file: {it['hardware'] or 'none, so planning needs --hardware=NAME'}")
    options = ", ".join(f"{name}={value}" for name, value in it["compiler_options"].items())
    console.print(f"compiler options: {options or 'none'}")


def _show(report: Mapping[str, Any], results: Sequence[checks.Result]) -> None:
    console = Console(highlight=False)
    console.width = max(console.width, 100)
    table = Table("check", "", "seconds", "")
    table.columns[2].justify = "right"
    for result in results:
        verdict = "[green]ok[/green]" if result.ok else "[bold red]FAILED[/bold red]"
        table.add_row(result.check.name, verdict, f"{result.seconds:.1f}", escape(result.why) or result.detail)
    console.print(table)
    for name, setting in report["advice"].items():
        untested = " (untested)" if setting in checks.UNTESTED.values() else ""
        fix = f"set --config.{setting}{untested}" if setting else "no setting goes around it"
        console.print(f"{name} failed: {fix}", soft_wrap=True)
    console.print("[green]ok[/green]" if report["ok"] else "[bold red]not ok[/bold red] (docs/selfcheck.md)")
