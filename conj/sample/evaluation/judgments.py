"""Existing judgments of a judge, to be scored without any model: conj's own files and published ones.

Told apart by their rows. Rows come out as in `judgments_NAME.jsonl`; `order` 1 shows the answers as the prompts row has
them. Published judgments belong to the order of their own files, so their prompts are not shuffled by the coin.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from conj import InputError
from conj.data.benchmarks import resolve_data
from conj.data.files import check_columns, listed
from conj.data.manifest import read_manifest
from conj.data.preprocess import load_prompts, make_row, unused_id
from conj.data.readers import read_preferences, read_rows
from conj.data.rows import swapped

OWN = {"id": str, "order": int, "text": str, "verdict": object, "label": int, "rung": str}
COUNT = (lambda value: type(value) is int and value >= 0, "a number from 0 up")
OPTIONAL = {
    "sample": COUNT, "prompt_tokens": COUNT, "completion_tokens": COUNT,
    "token_ids": (lambda value: isinstance(value, list), "a list"),
    "p_first": (lambda value: type(value) in (int, float) and 0 <= value <= 1, "a number from 0 to 1"),
    "dollars": (lambda value: type(value) in (int, float) and 0 <= value < math.inf, "a number from 0 up"),
}  # fmt: skip
WINNERS = {"1": 1, "2": 2, None: None, "None": None}
RESULTS = {"0": 0, "1": 1, "2": 2, "Tie": 0, "garbage": None}  # as PandaLM's outputs write them


Judgments = tuple[list[dict], list[dict]]  # rows of prompts, rows of their judgments


def read_judgments_file(
    path: Path, data: Sequence[str] = (), seed: int = 2021, subsets: Sequence[str] = (), limit: int | None = None
) -> Judgments:
    """Prompts rows, as `load_prompts` makes them for benchmarks, and judgments rows; none for a prompt that was too long.

    `data`, `seed`, `subsets`, `limit`: the benchmarks that were judged, as in `load_prompts`. LLMBar's `result.json`
    holds its own prompts and needs no data; `limit` then counts its rows. Raises InputError, with file and row, for a
    malformed file, and for judgments that do not fit the data."""
    rows = list(read_rows(str(path)))
    if not rows:
        raise InputError(f"{path}: expected at least one judgment, found none")
    first = rows[0][1] if isinstance(rows[0][1], dict) else {}
    if "results" in first:
        return _select(*_read_llmbar(path, rows), subsets, limit)
    if not data:
        raise InputError(f"{path}: expected the data that was judged, found no --data")
    if column := next((name for name in first if name.endswith("_result")), None):
        return _select(*_read_pandalm(path, rows, column, data), subsets, limit)
    return _read_own(path, rows, data, seed, subsets, limit)


def _read_own(path, rows, data, seed, subsets, limit) -> tuple[list[dict], list[dict]]:
    judgments = [_parse(where, row, OWN, _own_judgment) for where, row in rows]
    prompts, _ = load_prompts(data, seed, subsets, limit, benchmark=True)
    labels = {row["id"]: row["label"] for row in prompts}
    known = labels
    if subsets or limit:  # judgments of the rest of the data are no mistake
        known = {row["id"] for row in load_prompts(data, seed, benchmark=True)[0]}
    _require_none(path, "judgments of prompts that are not in the data", [j["id"] for j in judgments], known)
    judgments = [row for row in judgments if row["id"] in labels]
    if wrong := [row["id"] for row in judgments if row["label"] != labels[row["id"]]]:
        raise InputError(f"{path}: {listed(wrong)} have another label than the data; was another --seed used?")
    twice = Counter((row["id"], row["order"], row["sample"]) for row in judgments)
    if repeated := [" ".join(map(str, key)) for key, count in twice.items() if count > 1]:
        raise InputError(f"{path}: {len(repeated)} judgments (id, order, sample) appear twice: {listed(repeated)}")
    asked = defaultdict(set)
    for row in judgments:
        asked[row["id"]].add((row["order"], row["sample"]))
    orders = {order for keys in asked.values() for order, _ in keys}
    num_samples = max(map(len, asked.values()), default=0) // max(len(orders), 1)
    whole = {(order, sample) for order in orders for sample in range(num_samples)}
    if torn := [id for id, keys in asked.items() if keys != whole]:
        raise InputError(
            f"{path}: expected {len(whole)} judgments of each prompt (orders {listed(sorted(orders))}, samples from 0 on), "
            f"found others of {len(torn)}: {listed(torn)}"
        )
    manifest = read_manifest(path)
    if manifest is not None and not manifest["complete"]:
        raise InputError(f"{path}: was cut short; run its stage again to finish it")
    # Its manifest says which are rightly missing: they did not fit the context.
    overlong = manifest["counts"].get("overlong_ids", []) if manifest is not None else []
    _require_none(path, "prompts of the data without a judgment", labels, asked.keys() | set(overlong))
    return prompts, judgments


def _own_judgment(row: dict) -> dict:
    _member(row["order"], "order", (1, 2))
    for name, (holds, expected) in OPTIONAL.items():
        if row.get(name) is not None and not holds(row[name]):
            raise InputError(f"expected {name} to be {expected}, found {str(row[name])[:40]!r}")
    verdict = _member(row["verdict"], "verdict", (None, 0, 1, 2))
    choice = swapped(verdict) if row["order"] == 2 else verdict
    if (found := row.get("choice", choice)) != choice:
        raise InputError(f"expected choice {choice}, of verdict {verdict} in order {row['order']}; found {found!r}")
    return {"sample": 0, "finish_reason": None} | row | {"choice": choice}


def _read_llmbar(path: Path, rows: list) -> tuple[list[dict], list[dict]]:
    """Rows of LLMBar's evaluators: both orders, winners already told in the order of the file."""
    prompts, judgments = {}, []
    for record, (where, row) in zip(read_preferences(str(path)), rows, strict=True):
        prompt = make_row(record, path.name, None, "llmbar")
        prompt["id"] = unused_id(prompt["id"], prompts)
        prompts[prompt["id"]] = prompt
        judgments += _parse(where, row, {"results": list}, lambda row, prompt=prompt: _llmbar_judgments(row, prompt))
    return list(prompts.values()), judgments


def _llmbar_judgments(row: dict, prompt: dict) -> list[dict]:
    judgments = []
    if not row["results"]:
        raise InputError("expected at least one result, found none")
    for sample, result in enumerate(row["results"]):
        for order, name in ((1, "swap = False"), (2, "swap = True")):
            if not isinstance(result, dict) or not isinstance(result.get(name), dict) or "winner" not in result[name]:
                raise InputError(f"expected results with {name!r} and its winner")
            winner = result[name]["winner"]
            if not isinstance(winner, str | None) or winner not in WINNERS:
                raise InputError(f"expected winner '1', '2' or null; found {winner!r}")
            completion = result[name].get("completion", "")
            parts = completion if isinstance(completion, list) else [completion]
            text = "\n".join(str(part) for part in parts if part)
            judgments.append(_published(prompt, order, sample, text, WINNERS[winner]))
    return judgments


def _read_pandalm(path: Path, rows: list, column: str, data: Sequence[str]) -> tuple[list[dict], list[dict]]:
    """Rows of a judge's results on PandaLM's test set, by `idx`; shown in one order only."""
    names = [name for name, benchmark in map(resolve_data, data) if benchmark == "pandalm"]
    if len(names) != 1 or len(data) != 1:
        raise InputError(f"{path}: expected --data with PandaLM's test set alone, found {', '.join(data)}")
    results = {}
    for where, row in rows:
        idx, judged = _parse(where, row, {"idx": int, column: object}, lambda row: (row["idx"], row))
        if idx in results:
            raise InputError(f"{where}: idx {idx} appears twice")
        if str(judged[column]) not in RESULTS:
            raise InputError(f"{where}: expected {column} to be one of {', '.join(RESULTS)}; found {judged[column]!r}")
        results[idx] = judged
    indices = [_parse(where, row, {"idx": int}, lambda row: row["idx"]) for where, row in read_rows(names[0])]
    _require_none(path, "results whose idx is not in the data", list(results), set(indices))
    _require_none(path, "rows of the data without a result", indices, results.keys())
    prompts, judgments = {}, []
    for idx, record in zip(indices, read_preferences(names[0]), strict=True):
        if record.unusable == "tie" and len(set(record.votes)) == len(record.votes):
            continue  # no majority to agree with
        prompt = make_row(record, Path(names[0]).name, None, "pandalm")
        prompt["id"] = unused_id(prompt["id"], prompts)
        prompts[prompt["id"]] = prompt
        text = results[idx].get(column.removesuffix("result") + "reason")
        text = text if isinstance(text, str) else ""
        judgments.append(_published(prompt, 1, 0, text, RESULTS[str(results[idx][column])]))
    return list(prompts.values()), judgments


def _published(prompt: dict, order: int, sample: int, text: str, choice: int | None) -> dict:
    return {
        "id": prompt["id"], "order": order, "sample": sample, "text": text,
        "verdict": swapped(choice) if order == 2 else choice, "choice": choice, "label": prompt["label"],
        "rung": "published", "finish_reason": None,
    }  # fmt: skip


def _select(prompts, judgments, subsets, limit) -> tuple[list[dict], list[dict]]:
    """What `subsets` and `limit` keep of a published file."""
    if missing := sorted(set(subsets) - {row["subset"] for row in prompts}):
        raise InputError(f"--subsets: no records of {', '.join(map(repr, missing))}")
    kept = [row for row in prompts[:limit] if not subsets or row["subset"] in subsets]
    ids = {row["id"] for row in kept}
    return kept, [row for row in judgments if row["id"] in ids]


def _parse(where: str, row, columns: dict[str, type], make: Callable):
    """`make(row)` of a row with these columns, with the row's place in any InputError."""
    check_columns(row, columns, where)
    try:
        return make(row)
    except InputError as e:
        raise InputError(f"{where}: {e}") from None


def _member(value, name: str, allowed: tuple):
    if isinstance(value, bool | float) or value not in allowed:
        raise InputError(f"expected {name} to be one of {', '.join(map(str, allowed))}; found {value!r}")
    return value


def _require_none(path: Path, what: str, ids: Sequence, allowed) -> None:
    if extra := list(dict.fromkeys(id for id in ids if id not in allowed)):
        raise InputError(f"{path}: {len(extra)} {what}: {listed(extra)}")
