"""The metrics of a server, for Prometheus."""

import math
from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from bigmac_jax.inference.engine import Engine

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counts what a server does. Those about the engine are read from it whenever Prometheus asks."""

    def __init__(self, engine: Engine) -> None:
        self._registry = registry = CollectorRegistry()
        self._engine = engine

        def counter(name: str, text: str, labels: Sequence[str] = ()) -> Counter:
            return Counter(f"bigmac_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, value: Callable[[], int]) -> None:
            Gauge(f"bigmac_{name}", text, registry=registry).set_function(value)

        def seconds(name: str, text: str) -> Histogram:
            return Histogram(f"bigmac_{name}_seconds", text, registry=registry, buckets=_SECONDS)

        self.requests = counter("requests", "Requests by path and status.", ("path", "status"))
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts.")
        self.reused_tokens = counter("reused_prompt_tokens", "Of them, those that the cache held.")
        self.new_tokens = counter("new_tokens", "Tokens that were generated.")
        self._drafted = counter("drafted_tokens", "Tokens that were drafted (--speculate).")
        self._accepted = counter("accepted_tokens", "Of them, those that were accepted.")
        self._counted = 0, 0  # the two
        gauge("completions_running", "Completions that have a slot.", lambda: engine.running)
        gauge("completions_waiting", "Completions that wait for one.", lambda: engine.waiting)
        gauge("slots", "Completions that run at a time, at most.", lambda: engine.shards * engine.slots)
        gauge("cache_pages", "Pages of the cache.", lambda: sum(pages.number for pages in engine.pages))
        gauge("cache_pages_used", "Of them, those that completions hold.", lambda: sum(p.in_use for p in engine.pages))
        self.first_token = seconds("first_token", "From a request's arrival to its first token.")
        self.between_tokens = seconds("between_tokens", "Between two tokens of a completion.")
        self._request = seconds("request", "Of a whole request.")
        self._recent = 1.0

    def count_request(self, seconds: float) -> None:
        """Counts a request that was answered after so many seconds."""
        self._request.observe(seconds)
        self._recent += 0.1 * (seconds - self._recent)

    def retry_seconds(self) -> int:
        """Seconds that a client who is turned away should wait: about as long as recent requests took."""
        return min(60, max(1, math.ceil(self._recent)))

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        if drafts := self._engine.drafts:
            before, self._counted = self._counted, (drafts.drafted, drafts.accepted)
            for counter, total, last in zip((self._drafted, self._accepted), self._counted, before, strict=True):
                counter.inc(total - last)
        return generate_latest(self._registry)
