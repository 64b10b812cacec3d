"""What the fuzzer's targets share: decisions read off bytes, and what a finding is."""

from collections.abc import Callable

Choose = Callable[[int], int]  # choose(n): a number from 0 to n - 1


class Finding(AssertionError):
    """What must not happen, in a line."""


def chooser(data: bytes) -> Choose:
    """Decisions read off `data`; 0 once it is used up."""
    stream = iter(data)

    def choose(n: int) -> int:
        value = next(stream, 0)
        if n > 256:
            value = value << 16 | next(stream, 0) << 8 | next(stream, 0)
        return value % n

    return choose


def pick(choose: Choose, items):
    return items[choose(len(items))]
