"""What a server counts, as Prometheus reads it."""

import math
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Of one server."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()

        def counter(name: str, text: str, labels: Sequence[str] = ()) -> Counter:
            return Counter(f"bigmac_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"bigmac_{name}", text, registry=registry)

        def seconds(name: str, text: str) -> Histogram:
            return Histogram(f"bigmac_{name}_seconds", text, registry=registry, buckets=_SECONDS)

        self.requests = counter("requests", "Requests by path and status.", ("path", "status"))
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts.")
        self.reused_tokens = counter("reused_prompt_tokens", "Of them, those that the cache held.")
        self.new_tokens = counter("new_tokens", "Tokens that were generated.")
        self.drafted_tokens = counter("drafted_tokens", "Tokens that were drafted (--speculate).")
        self.accepted_tokens = counter("accepted_tokens", "Of them, those that were accepted.")
        self._drafted = self._accepted = 0
        self.running = gauge("completions_running", "Completions that have a slot.")
        self.waiting = gauge("completions_waiting", "Completions that wait for one.")
        self.slots = gauge("slots", "Completions that run at a time, at most.")
        self.pages = gauge("cache_pages", "Pages of the cache.")
        self.pages_used = gauge("cache_pages_used", "Of them, those that completions hold.")
        self.first_token = seconds("first_token", "From a request's arrival to its first token.")
        self.between_tokens = seconds("between_tokens", "Between two tokens of a completion.")
        self.whole_request = seconds("request", "Of a whole request.")
        self._recent = 1.0

    def drafts(self, drafted: int, accepted: int) -> None:
        """How many there are by now."""
        self.drafted_tokens.inc(drafted - self._drafted)
        self.accepted_tokens.inc(accepted - self._accepted)
        self._drafted, self._accepted = drafted, accepted

    def ended(self, seconds: float) -> None:
        """A request that was answered."""
        self.whole_request.observe(seconds)
        self._recent += 0.1 * (seconds - self._recent)

    def seconds_to_wait(self) -> int:
        """About as long as requests took of late: what one that is turned away is told."""
        return min(60, max(1, math.ceil(self._recent)))

    def text(self) -> bytes:
        return generate_latest(self.registry)
