"""Formats numbers as people read them."""

# (least number, unit, its name), largest first. Tera and GiB hold up to four digits before the point, as in the paper's
# tables.
_FLOPS = ((1e19, 1e18, "E"), (1e16, 1e15, "P"), (0, 1e12, "T"))
_BYTES = (
    (1e4 * 2**40, 2**50, "PiB"), (1e4 * 2**30, 2**40, "TiB"), (2**30, 2**30, "GiB"), (2**20, 2**20, "MiB"),
    (2**10, 2**10, "KiB"),
)  # fmt: skip
_COUNTS = ((1e12, 1e12, "T"), (1e9, 1e9, "B"), (1e6, 1e6, "M"), (1e3, 1e3, "k"))
_ELAPSED = ((3600, 3600, "h"), (60, 60, "min"), (0, 1, "s"))
_SECONDS = ((1, 1, "s"), (1e-3, 1e-3, "ms"), (1e-12, 1e-6, "µs"))


def _scale(number: float, units: tuple[tuple[float, float, str], ...], form: str = ",.2f") -> str:
    """A number in the first unit that it, or what it is below zero, is large enough for."""
    for least, unit, name in units:
        if abs(number) >= least:
            return f"{number / unit:{form}} {name}"
    return f"{number:g}"


def is_near(number: float, other: float) -> bool:
    """Whether two counts of parameters differ by at most 2 %: models of one size."""
    return abs(number - other) <= 0.02 * other


def count(number: float) -> str:
    """A count, as 3.73 B."""
    return _scale(number, _COUNTS)


def work(flops: float) -> str:
    """FLOPs, as 3,649.00 T or 569.67 P."""
    return _scale(flops, _FLOPS)


def size(number: float) -> str:
    """Bytes, as 1,488.00 GiB or 111.67 TiB."""
    return _scale(number, _BYTES) if abs(number) >= 2**10 else f"{number:g} B"


def duration(seconds: float) -> str:
    """Seconds, as 1.23 s or 12.3 ms."""
    return _scale(seconds, _SECONDS, ".3g")


def elapsed(seconds: float) -> str:
    """A time that was waited for, as 15 s, 4.2 min or 12.3 h."""
    return _scale(seconds, _ELAPSED, ".3g")


def percent(share: float) -> str:
    """A share, as 3.7 %."""
    return f"{100 * share:.1f} %"
