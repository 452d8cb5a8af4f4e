"""How messages count, for all rooms."""


def counted(number: int, noun: str) -> str:
    """A number and what it counts: "1 picture", "0 pictures", "12 epochs".

    Args:
        number: how many.
        noun: one of them; its plural ends in an s.
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def time_span(seconds: float) -> str:
    """A length of time in a unit that suits it: "3.1 s", "42 s", "12 min", "5.5 h", "2.1 d"."""
    for unit, size, digits in (("d", 86_400, 1), ("h", 3600, 1), ("min", 60, 0)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.{digits}f} {unit}"
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
