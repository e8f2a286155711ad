"""Numbers as people read them. Tera and GiB hold up to four digits before the point, as in the paper's tables."""

_DIGITS = 10_000


def count(number: float) -> str:
    """3.73 B."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.2f} {unit}"
    return f"{number:g}"


def work(flops: float) -> str:
    """3,649.00 T, 569.67 P."""
    for limit, unit in ((1e18, "E"), (1e15, "P")):
        if flops >= _DIGITS * limit / 1e3:
            return f"{flops / limit:,.2f} {unit}"
    return f"{flops / 1e12:,.2f} T"


def size(number: float) -> str:
    """1,488.00 GiB, 111.67 TiB."""
    for limit, unit in ((2**50, "PiB"), (2**40, "TiB")):
        if number >= _DIGITS * limit / 2**10:
            return f"{number / limit:,.2f} {unit}"
    for limit, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= limit:
            return f"{number / limit:,.2f} {unit}"
    return f"{number:g} B"


def duration(seconds: float) -> str:
    """1.23 s, 12.3 ms."""
    for limit, unit in ((1, "s"), (1e-3, "ms")):
        if seconds >= limit:
            return f"{seconds / limit:.3g} {unit}"
    return f"{1e6 * seconds:.3g} µs" if seconds else "0"


def percent(share: float) -> str:
    """3.7 %."""
    return f"{100 * share:.1f} %"
