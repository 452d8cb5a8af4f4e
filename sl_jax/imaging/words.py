"""How messages count, for all rooms."""


def counted(number: int, noun: str) -> str:
    """A number and what it counts: "1 picture", "0 pictures", "12 epochs".

    Args:
        number: how many.
        noun: one of them; its plural ends in an s.
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
