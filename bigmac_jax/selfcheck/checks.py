"""What is checked on this machine, in which order, and what to set instead of what fails."""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from bigmac_jax.model.choose_exchange import available_exchanges
from bigmac_jax.model.exchange import STRATEGIES
from bigmac_jax.planning.topologies import first_line
from bigmac_jax.runtime import hosts
from bigmac_jax.selfcheck.on_devices import MismatchError
from bigmac_jax.selfcheck.part_checks import (
    BOUNDS,
    check_attention,
    check_decoding,
    check_exchange,
    check_experts,
    check_training,
)

# Settings to take, the best first, where a check of a part fails and all of theirs pass.
_ALTERNATIVES = {
    "attention": ("execution.attention=xla", "execution.attention=auto"),
    "exchange": tuple(f"execution.exchange={name}" for name in STRATEGIES),
}
# What to try else: it needs least of the platform, and no check asks for it by name.
UNTESTED = {"attention": "execution.attention=blocks", "experts": "execution.grouped_matmul=blocks"}
_IMPLEMENTATIONS = {"cpu": ("auto", "xla"), "tpu": ("auto", "xla"), "gpu": ("auto", "xla", "cudnn", "triton")}


class Check(NamedTuple):
    """One thing that the machine must compute right.

    Attributes:
      part: the part of the program that is checked.
      setting: what selects that part, or "".
      run: raises an exception, or says how good the part is.
    """

    name: str
    part: str
    setting: str
    run: Callable[[], str]


class Result(NamedTuple):
    """The outcome of a check.

    Attributes:
      why: why it failed; "" if it is ok.
      detail: how good it is, in words.
    """

    check: Check
    why: str
    detail: str
    seconds: float

    @property
    def ok(self) -> bool:
        return not self.why


def run(check: Check) -> Result:
    """Runs a check, which fails where it raises an exception; the result is the same in all processes."""
    start, detail, why = time.perf_counter(), "", ""
    try:
        detail = check.run()
    except MismatchError as error:
        why = str(error)
    except Exception as error:
        why = f"{type(error).__name__}: {first_line(error)}"
    found = [
        text if process == 0 else f"process {process}: {text}" for process, text in enumerate(hosts.gather(why)) if text
    ]
    return Result(check, found[0] if found else "", detail, time.perf_counter() - start)


def advice(results: Sequence[Result]) -> dict[str, str]:
    """What to set instead, by the name of each check that failed: what passed all of its checks, or else what is of
    UNTESTED; "" where there is neither."""
    red = {result.check.setting for result in results if not result.ok}
    green = {result.check.setting for result in results} - red

    def instead(part: str) -> str:
        return next((s for s in _ALTERNATIVES.get(part, ()) if s in green), UNTESTED.get(part, ""))

    return {result.check.name: instead(result.check.part) for result in results if not result.ok}


def all_checks(devices: Sequence[Any]) -> list[Check]:
    """The checks of a mesh over `devices`."""
    checks = []
    for layout in ("dropless", "capacity"):
        for dtype in BOUNDS:
            test = functools.partial(check_experts, devices, layout == "dropless", dtype)
            checks.append(Check(f"experts {layout} {dtype}", "experts", "execution.grouped_matmul=auto", test))
    for implementation in _IMPLEMENTATIONS.get(devices[0].platform, ("auto", "xla")):
        for dtype in BOUNDS:
            if (implementation, dtype) != ("cudnn", "float32"):
                test = functools.partial(check_attention, devices, implementation, dtype)
                setting = f"execution.attention={implementation}"
                checks.append(Check(f"attention {implementation} {dtype}", "attention", setting, test))
    for dtype in BOUNDS:
        checks.append(Check(f"decoding {dtype}", "decoding", "", functools.partial(check_decoding, devices, dtype)))
    for name in available_exchanges(devices[0].device_kind):
        test = functools.partial(check_exchange, devices, name)
        checks.append(Check(f"exchange {name}", "exchange", f"execution.exchange={name}", test))
    checks.append(Check("training step", "training", "", functools.partial(check_training, devices)))
    return checks
