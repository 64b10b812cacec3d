"""Figures and texts as Markdown pages show them: the report, the attack card and the model card say them alike."""

import html


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def percent_interval(interval: list[float] | None) -> str:
    return "" if interval is None else f"{100 * interval[0]:.1f} – {100 * interval[1]:.1f}"


def with_interval(figures: dict, name: str) -> str:
    """A figure of Markdown: value, interval, and whether it is one of a part of its rows."""
    text, interval = percent(figures[name]), percent_interval(figures[f"{name}_ci95" if name != "value" else "ci95"])
    text += f" ({interval})" if interval else ""
    return text + ", partial" if figures.get("partial") else text


def cell(text: object) -> str:
    """A text as a cell of a Markdown table: what it holds can become neither a cell, nor a line, nor HTML."""
    return html.escape(" ".join(str(text).split()), quote=False).replace("|", "\\|")
