"""conj trains generative judges the Con-J way (ICLR 2025, arXiv 2410.03742)."""

__version__ = "0.1.0"


class InputError(ValueError):
    """What the user gave cannot be used. The message is one line: what, where, expected, found.

    Every command prints it to stderr and exits with code 2.
    """
