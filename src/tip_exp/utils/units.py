"""Bytes and seconds in larger units."""

MIB, GIB = 2**20, 2**30


def format_duration(seconds: float) -> str:
    """48 s, 12 min, 3.5 h, 12 d"""
    for limit, size, unit in ((172_800, 86_400, "d"), (5_400, 3_600, "h"), (120, 60, "min")):
        if seconds >= limit:
            value = seconds / size
            return f"{value:.1f} {unit}" if value < 10 else f"{value:,.0f} {unit}"
    return f"{seconds:.0f} s"
