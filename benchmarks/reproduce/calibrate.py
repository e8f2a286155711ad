"""The one number that is fitted: the rate of the links, so that fine_grained at K = 8 has the paper's bottleneck.

At the rate R a step takes N + A/R + E/R: computation, the sum of the gradients, and the exchange, which is what a step
without exchange, N + A/R, takes less. A forward pass sums no gradients and exchanges half as much.
"""

from typing import Any

from benchmarks.reproduce.lab import Lab, exchange_share

SHARE = 0.918  # of a training step that the exchange takes (the paper's Table 1)
TOLERANCE = 0.008
_ALL_TO_ALL = 1.7  # gloo's time over bytes by rate; only the first guess depends on it


class CalibrationError(RuntimeError):
    """No rate gives the share."""


def calibrate(lab: Lab, size: str, program: str = "train", wanted: float = SHARE, rounds: int = 5) -> dict[str, Any]:
    """Searches the rate at which `wanted` of a step, or of a pass of the program forward, is exchange.

    Returns:
      rate (bits a second), the share that was reached, and the rounds: rate, both times, share.
    """
    k = "model.top_k=8"
    traffic = lab.traffic(size, k)
    (free,) = lab.measure([lab.case(size, k, program=program, local=True)])
    exchange, other = (8 * traffic[f"{name}_sent_bytes"] / lab.hosts for name in ("exchange", "other"))
    if program == "forward":
        exchange, other = exchange / 2, 0.0
    rate = rate_of(free["median_s"], other, _ALL_TO_ALL * exchange, wanted)
    tried = []
    for _ in range(rounds):
        rate = float(f"{rate:.4g}")
        shaped, local = lab.measure(
            [lab.case(size, k, program=program, rate=rate, local=local) for local in (False, True)]
        )
        step, without = shaped["median_s"], local["median_s"]
        share = exchange_share(step, without)
        tried.append({"rate": rate, "step_s": step, "local_s": without, "share": share})
        print(f"  {rate / 1e6:.4g} Mbit/s: {share:.1%} of a {shaped['unit']} is exchange", flush=True)
        if abs(share - wanted) <= TOLERANCE:
            break
        computed = min(without, free["median_s"])
        rate = rate_of(computed, rate * (without - computed), rate * (step - without), wanted)
    else:
        print(f"  none of {rounds} rates gave {wanted:.1%}; the nearest is taken", flush=True)
    best = min(tried, key=lambda line: abs(line["share"] - wanted))
    return {"rate": best["rate"], "share": best["share"], "paper": wanted, "rounds": tried}


def rate_of(seconds: float, gradients: float, exchange: float, share: float = SHARE) -> float:
    """R at which E/R is `share` of N + A/R + E/R.

    Args:
      seconds: N.
      gradients, exchange: A and E, in bits, or in seconds times the rate at which they were measured.
    """
    left = (1 - share) * exchange - share * gradients
    if left <= 0:
        raise CalibrationError(
            f"the gradients' sum takes {gradients / exchange:.1%} of the exchange's time, so that the exchange never "
            f"takes {share:.1%} of a step; more tokens a step, or a machine without other work"
        )
    return left / (share * seconds)
