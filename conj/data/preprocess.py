"""Stage 1: any preference data sets to `prompts.jsonl`, one question with two answers and a label a row.

Which answer comes first is decided by a coin from the seed and the record's id, and the id is a hash of the record's
content: neither depends on the order of rows or on the machine. Left out, and counted: identical answers (nothing to
prefer), ties, a chosen and a rejected conversation that ask different things, and duplicates. Kept, and counted:
empty answers, and answers that are not strings, as their JSON text.

    python -m conj.data.preprocess --run-dir runs/demo --data HuggingFaceH4/ultrafeedback_binarized:train_prefs
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from conj import InputError
from conj.data import manifest
from conj.data.benchmarks import BENCHMARKS, official_subset, resolve_data
from conj.data.files import listed, stream_jsonl, write_jsonl
from conj.data.layouts import Preference, swapped
from conj.data.manifest import RunOptions
from conj.data.options import option, require_each, run_command
from conj.data.progress import progress
from conj.data.readers import DATA_PARTS, describe_data, read_preferences, split_name, without_revision


@dataclass(frozen=True, kw_only=True)
class PreprocessOptions(RunOptions):
    data: tuple[str, ...] = option(
        help=f"preference data: files, folders or hub names, each {DATA_PARTS}", affects_result=False
    )
    seed: int = option(2021, help="seed of the order of the two answers")
    subsets: tuple[str, ...] = option((), help="names of the subsets to keep; all if not given")
    limit: int | None = option(None, help="number of rows read from the head of each data set; all if not given")

    def makes(self) -> dict[Path, list]:
        return {self.run_dir / "prompts.jsonl": describe_data(self.data)}

    def __post_init__(self):
        require_each(self, ("limit",), lambda value: value > 0, "a positive number of rows")


def preprocess(options: PreprocessOptions) -> None:
    """Writes `prompts.jsonl`. Raises InputError for unusable data or when every record is left out."""
    began, [(artefact, inputs)] = time.monotonic(), options.makes().items()
    if not manifest.begin(artefact, inputs=inputs, options=options):
        return
    counts = Counter()
    rows = make_rows(options.data, options.seed, options.subsets, options.limit, counts=counts)
    num_rows = write_jsonl(artefact, rows)
    manifest.finish(artefact, num_rows=num_rows, counts=dict(counts), seconds=time.monotonic() - began)


def load_prompts(
    data: Sequence[str],
    seed: int = 2021,
    subsets: Sequence[str] = (),
    limit: int | None = None,
    benchmark: bool = False,
) -> tuple[list[dict], dict[str, int]]:
    """Rows as in `prompts.jsonl`, and how many records met each fate (`empty_answers` and the like count answers).

    With `benchmark`, for evaluation: `data` may name benchmarks (see `resolve_data`), rows say which they are of, and
    official numbers of rows are kept to: a repeated row stays (the second with id `ID-2`), and so does a tie, with
    label 0, where the benchmark has ties. Such rows also hold its annotators' `votes`.

    Raises InputError for unusable data, a subset that is not there, or when every record is left out."""
    counts = Counter()
    return list(make_rows(data, seed, subsets, limit, benchmark, counts=counts)), dict(counts)


def make_rows(
    data: Sequence[str],
    seed: int,
    subsets: Sequence[str],
    limit: int | None,
    benchmark: bool = False,
    *,
    counts: Counter,
) -> Iterator[dict]:
    """The rows of `load_prompts`, one in memory at a time; `counts` is whole when they are all there."""
    ids, found = set(), set()
    counts["records"] = 0
    for given in data:
        name, known = resolve_data(given) if benchmark else (given, "")
        source = Path(name).name if Path(split_name(name)[0]).exists() else without_revision(name)
        for record in progress(read_preferences(name, limit), desc=f"reading {source}", unit=" records"):
            counts["records"] += 1
            row = make_row(record, source, seed, known if benchmark else None)
            found.add(row["subset"])
            if reason := _why_left_out(record, row, subsets, set() if benchmark else ids):
                counts[f"left_out_{reason}"] += 1
                continue
            row["id"] = unused_id(row["id"], ids)
            ids.add(row["id"])
            counts["empty_answers"] += [row["answer_1"], row["answer_2"]].count("")
            counts["non_string_answers"] += sum(not isinstance(a, str) for a in (record.better, record.worse))
            yield row
    if missing := sorted(set(subsets) - found):
        raise InputError(f"--subsets: no records of {listed(missing, repr)}; found {listed(sorted(found), repr)}")
    if not ids:
        raise InputError(f"{', '.join(data)}: every record was left out: {dict(counts)}")


def _why_left_out(record: Preference, row: dict, subsets: Sequence[str], ids: set[str]) -> str | None:
    if subsets and row["subset"] not in subsets:
        return "subset"
    if votes := row.get("votes"):  # a tie is an answer; three annotators of three minds have no majority
        return "no_majority" if len(set(votes)) == len(votes) else None
    if record.unusable is not None:
        return record.unusable
    if row["answer_1"] == row["answer_2"]:
        return "identical"
    return "duplicate" if row["id"] in ids else None


def unused_id(id: str, ids: Collection[str]) -> str:
    """The id, or for one that is in `ids` already `ID-2`, then `ID-3`."""
    k, free = 1, id
    while free in ids:
        free = f"{id}-{(k := k + 1)}"
    return free


def make_row(record: Preference, source: str, seed: int | None, benchmark: str | None = None) -> dict:
    """A record as a row of `prompts.jsonl`; its label is where the coin puts the better answer. Without a seed there is
    no coin: the answers stand as in the source.

    With `benchmark`, its name or "", a row for evaluation: see `load_prompts`."""
    better, worse = (a if isinstance(a, str) else json.dumps(a) for a in (record.better, record.worse))
    identity = json.dumps([record.question, better, worse, record.subset], sort_keys=True)
    id = hashlib.sha256(identity.encode()).hexdigest()[:16]
    coin = hashlib.sha256(f"{seed}:{id}".encode()).digest()[0] % 2 == 1
    swap = record.place == 2 if seed is None else coin
    row = {
        "id": id, "question" if isinstance(record.question, str) else "messages": record.question,
        "answer_1": worse if swap else better, "answer_2": better if swap else worse, "label": 2 if swap else 1,
        "source": source, "subset": record.subset,
    }  # fmt: skip
    if benchmark is not None:
        row |= {"subset": official_subset(benchmark, record.subset, record.where), "benchmark": benchmark}
    if benchmark and BENCHMARKS[benchmark].has_ties:
        row["label"] = 0 if record.unusable == "tie" else row["label"]
        row["votes"] = [swapped(vote) if swap else vote for vote in record.votes]
    return row


def read_prompts(path: Path) -> list[dict]:
    """Rows of a `prompts.jsonl`, all at once; see `stream_prompts`."""
    return list(stream_prompts(path))


def stream_prompts(path: Path) -> Iterator[dict]:
    """Rows of a `prompts.jsonl`. Raises InputError for a file that stage 1 did not write so."""
    texts, ids = ("id", "answer_1", "answer_2", "source", "subset"), set()
    for number, row in stream_jsonl(path, dict.fromkeys(texts, str) | {"label": int}):
        if ("question" in row) == ("messages" in row):
            raise InputError(f"{path}:{number}: expected either question or messages")
        turns = [{"role": "user", "content": row["question"]}] if "question" in row else row["messages"]
        if not is_conversation(turns):
            raise InputError(f"{path}:{number}: expected a question of text or of messages, found {str(turns)[:60]!r}")
        if row["label"] not in (1, 2):
            raise InputError(f"{path}:{number}: expected label 1 or 2, found {row['label']!r}")
        if row["id"] in ids:
            raise InputError(f"{path}:{number}: id {row['id']} appears twice")
        ids.add(row["id"])
        yield row


def is_conversation(turns) -> bool:
    """Whether this is a list, not empty, of messages with a role and a content of text."""
    return bool(turns) and isinstance(turns, list) and all(
        isinstance(turn, dict) and all(isinstance(turn.get(key), str) for key in ("role", "content")) for turn in turns
    )  # fmt: skip


def question_of(row: dict) -> str | list[dict]:
    """The question of a row of `prompts.jsonl`: a text, or chat messages."""
    return row["messages"] if "messages" in row else row["question"]


if __name__ == "__main__":
    run_command(preprocess, PreprocessOptions, __doc__)
