"""What became of the rows of a data set: how many met each fate, where the first of them stands, and which columns nothing read."""

from collections import Counter

SHOWN = 60  # characters of an example's value


class Fates:
    """Counts by fate (`records`, `left_out_tie`, `empty_answers`), an example of each, and the columns that were left over."""

    def __init__(self):
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, str] = {}  # fate -> where the first stands
        self.leftover: dict[str, dict] = {}  # column -> {"rows": how many hold something, "example": one}
        self.not_needed: Counter[str] = Counter()  # columns known and not needed (model names, dates): how many rows

    def add(self, fate: str, where: str = "", number: int = 1) -> None:
        """Counts `number` of a fate; the first place (`rows.jsonl:3`) that is not empty becomes its example."""
        self.counts[fate] += number
        if number and where:
            self.examples.setdefault(fate, where)

    def leave(self, column: str, where: str, value) -> None:
        """Counts a column that nothing was made of, in a row where it holds `value`."""
        found = self.leftover.setdefault(column, {"rows": 0, "example": f"{where}: {str(value)[:SHOWN]!r}"})
        found["rows"] += 1

    def report(self) -> dict:
        """What a manifest records beside the counts: `examples` and, where there are any, `unused_columns` and
        `columns_not_needed`."""
        columns = {"unused_columns": self.leftover, "columns_not_needed": dict(self.not_needed)}
        return {"examples": self.examples} | {k: v for k, v in columns.items() if v}
