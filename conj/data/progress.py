"""Progress of a loop: tqdm's bar on a terminal, and off one (a file, a pipe, a cluster's log) a line now and then."""

import sys

from tqdm import tqdm

SECONDS_PER_LINE = 10


class _Lines:
    """The file that tqdm writes to off a terminal: each state of the bar becomes a line of its own."""

    def write(self, text: str) -> None:
        if line := text.strip():  # "\r", the bar, blanks over the rest of the bar before; at the end "\n"
            print(line, file=sys.stderr, flush=True)

    def flush(self) -> None:
        pass


def progress(iterable=None, **settings) -> tqdm:
    """tqdm with these settings. Off a terminal: its counts as plain lines at the start, at the end, and every
    SECONDS_PER_LINE between, when there is progress."""
    if not sys.stderr.isatty():
        settings |= {"file": _Lines(), "ncols": 0, "mininterval": SECONDS_PER_LINE, "maxinterval": SECONDS_PER_LINE}
    return tqdm(iterable, **settings)
