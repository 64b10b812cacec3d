"""Readers: files of every kind come out as the same records, texts untouched, and a bad row is named by file and line."""

import bz2
import csv
import gzip
import json
import lzma
from functools import partial
from pathlib import Path

import pytest
from conftest import DATA, SHARED, here

from conj import InputError
from conj.data.fates import Fates
from conj.data.readers import describe_data, read_preferences

LLMBAR = {"input": "q", "output_1": "a", "output_2": "b", "label": 2}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """`datasets` keeps its cache out of the user's home."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def write(path: Path, rows: list[dict]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8")
    return str(path)


def records(*rows: dict, path: Path) -> list:
    return list(read_preferences(write(path / "rows.jsonl", list(rows))))


def turn(role: str, text: str, keys: tuple[str, str] = ("role", "content")) -> dict:
    return dict(zip(keys, (role, text)))


user, assistant = (partial(turn, role) for role in ("user", "assistant"))
human, gpt = (partial(turn, role, keys=("from", "value")) for role in ("human", "gpt"))
TURNS = {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]}

LAYOUTS = {
    "strings": ({"prompt": "q", "chosen": "a", "rejected": "b", "subset": "hep-go", "id": 3}, "hep-go"),
    "skywork": (TURNS | {"source": "m"}, "m"),
    "ultrafeedback": (
        TURNS | {"prompt": "q", "messages": [user("q"), assistant("a")], "score_chosen": 8.0, "score_rejected": 7.5}, "",
    ),
    "infinity": (TURNS | {"prompt": "q", "task_category": "Math"}, "Math"),
    "trl": ({"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]}, ""),
    "sharegpt": ({"conversations": [human("q")], "chosen": gpt("a"), "rejected": gpt("b")}, ""),
    "llmbar": ({"input": "q", "output_1": "b", "output_2": "a", "label": 2}, ""),
    "judgebench": ({"question": "q", "response_A": "b", "response_B": "a", "label": "B>A", "source": "law"}, "law"),
    "pandalm": (
        {"instruction": "q", "input": "", "response1": "b", "response2": "a"}
        | {"annotator1": 2, "annotator2": 1, "annotator3": 2}, "",
    ),
    "conj": ({"question": "q", "answer_1": "a", "answer_2": "b", "label": 1}, ""),
    "conj_messages": ({"messages": [user("q")], "answer_1": "a", "answer_2": "b", "label": 1}, ""),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_record(layout, tmp_path):
    """A layout read the wrong way round would train the judge to prefer the worse answers."""
    row, subset = LAYOUTS[layout]
    (record,) = records(row, path=tmp_path)
    assert (record.question, record.better, record.worse, record.subset) == ("q", "a", "b", subset)
    assert record.unusable is None


def test_all_turns_but_the_last_are_the_question(tmp_path):
    """A multi-turn question cut to its first turn would be judged against answers to something else."""
    opening = [{"role": "system", "content": "s"}, user("q1"), assistant("a1"), user("q2")]
    (record,) = records({"chosen": [*opening, assistant("a")], "rejected": [*opening, assistant("b")]}, path=tmp_path)
    assert (record.question, record.better, record.worse) == (opening, "a", "b")


def test_system_turn_of_sharegpt_is_kept():
    """A system turn changes what a good answer is."""
    questions = [record.question for record in read_preferences(str(DATA / "dpo_zh"))]
    with_system = [[turn["role"] for turn in question] for question in questions if isinstance(question, list)]
    assert with_system == [["system", "user"]] * 4


def test_answers_to_different_questions_state_no_preference(tmp_path):
    """Two conversations that part before the last turn do not answer the same question."""
    (record,) = records(TURNS | {"rejected": [user("another"), assistant("b")]}, path=tmp_path)
    assert record.unusable == "two_questions"


SAFERLHF = {"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": 0, "safer_response_id": 1}


def test_saferlhf_row_is_two_records(tmp_path):
    """The better response is often not the safer one: one label for both would be wrong for one of them."""
    found = [(record.subset, record.better, record.worse) for record in records(SAFERLHF, path=tmp_path)]
    assert found == [("better", "a", "b"), ("safer", "b", "a")]


def test_rm_bench_row_is_nine_records_named_by_difficulty():
    """Hard means that the worse answer looks richer; swapped, the benchmark would report easy as hard."""
    (row,) = json.loads((DATA / "rm_bench" / "rm_bench.json").read_text("utf-8"))
    found = {record.subset: (record.better, record.worse) for record in read_preferences(str(DATA / "rm_bench"))}
    assert len(found) == 9
    assert found["alpacaeval/hard/concise-markdown"] == (row["chosen"][0], row["rejected"][2])
    assert found["alpacaeval/easy/markdown-concise"] == (row["chosen"][2], row["rejected"][0])
    assert found["alpacaeval/normal/detailed-detailed"] == (row["chosen"][1], row["rejected"][1])


@pytest.mark.parametrize(("layout", "change"), [
    ("llmbar", {"label": 0}), ("judgebench", {"label": "A=B"}), ("ultrafeedback", {"score_chosen": 7.5}),
    ("strings", {"metadata": {"score_chosen": 6.0, "score_rejected": 6.0}}),
    ("pandalm", {"annotator1": 0, "annotator3": 0}), ("pandalm", {"annotator3": 0}),  # majority 0, and no majority
])  # fmt: skip
def test_ties_state_no_preference(layout, change, tmp_path):
    """The label of a tie is arbitrary."""
    (record,) = records(LAYOUTS[layout][0] | change, path=tmp_path)
    assert record.unusable == "tie"


def test_annotators_of_pandalm_decide_by_majority(tmp_path):
    """Reading the first annotator alone would invert rows in which the other two disagree with it."""
    row = LAYOUTS["pandalm"][0] | {"annotator1": 2, "annotator2": 1, "annotator3": 1, "input": "context"}
    (record,) = records(row, path=tmp_path)
    assert (record.question, record.better) == ("q\n\ncontext", "b")


def test_record_says_where_it_stands_and_how_its_source_numbered_the_answers(tmp_path):
    """Published judgments belong to the source's order, and votes to its numbers; `better` comes first here."""
    row = LAYOUTS["pandalm"][0] | {"annotator1": 2, "annotator2": 0, "annotator3": 2}
    first, second = records(row, row | {"annotator1": 1, "annotator3": 1}, path=tmp_path)
    assert (first.better, first.place, first.votes) == ("a", 2, (1, 0, 1))
    assert (second.better, second.place, second.votes) == ("b", 1, (1, 0, 1))
    assert second.where == f"{tmp_path}/rows.jsonl:2"


def test_booleans_among_answers_are_kept_as_booleans():
    """PandaLM holds JSON booleans for some answers; a reader with one type a column would drop them or fail."""
    answers = [a for record in read_preferences(str(DATA / "pandalm")) for a in (record.better, record.worse)]
    assert sum(answer is True for answer in answers) == 6 and answers.count("") == 1


TEXTS = {
    "date": "2024-01-01", "lone surrogate": "cut \ud83d", "carriage return": "a\r\nb\rc",
    "control characters": "\x00\x01\x1b[0m", "line separator": "a\u2028b\u0085c", "BOM": "\ufeffa",
    "not NFC": "e\u0301", "braces": "{question} {0} {{",
}  # fmt: skip


@pytest.mark.parametrize("escaped", [True, False], ids=["ASCII", "UTF-8"])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_texts_come_out_as_they_went_in(text, escaped, tmp_path):
    """`datasets` would turn the date into a timestamp and refuse the surrogate."""
    escaped |= text == TEXTS["lone surrogate"]  # UTF-8 cannot hold it otherwise
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(LLMBAR | {"output_2": text}, ensure_ascii=escaped).encode())
    assert [record.better for record in read_preferences(str(path))] == [text]


def pack(content: bytes, suffix: str) -> bytes:
    if suffix == ".zst":
        return bytes(pytest.importorskip("pyarrow").compress(content, codec="zstd", asbytes=True))
    return {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}.get(suffix, bytes)(content)


PACKED = ["rows.json.gz", "rows.jsonl.gz", "rows.jsonl.bz2", "rows.ndjson.xz", "rows.jsonl.zst"]


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.ndjson", *PACKED])
@pytest.mark.parametrize("array", [True, False], ids=["array", "lines"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "BOM"])
def test_json_is_read_in_every_wrapping(name, array, mark, tmp_path):
    """Array or lines, packed or not, with a byte order mark or not: the content says which, not the name."""
    text = json.dumps([LLMBAR] * 3) if array else "\n".join([json.dumps(LLMBAR)] * 3) + "\n\n"
    content = mark + text.encode()
    (tmp_path / name).write_bytes(pack(content, Path(name).suffix))
    assert [record.better for record in read_preferences(str(tmp_path / name))] == ["b"] * 3


def test_zst_of_several_frames_is_read_whole(tmp_path):
    """A file that was appended to has several frames; some readers stop at the end of the first."""
    path = tmp_path / "rows.jsonl.zst"
    path.write_bytes(pack(json.dumps(LLMBAR).encode() + b"\n", ".zst") * 3)
    assert len(list(read_preferences(str(path)))) == 3


@pytest.mark.parametrize("indent", [None, 1])
def test_rows_below_data_are_read(indent, tmp_path):
    """`{"data": […]}` in one line or in many; what stands beside is refused, as nothing would read it."""
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"data": [LLMBAR] * 3}, indent=indent))
    assert [record.where for record in read_preferences(str(path))] == [f"{path}: row {i}" for i in (1, 2, 3)]
    path.write_text(json.dumps({"version": 1, "data": [LLMBAR]}, indent=indent))
    with pytest.raises(InputError, match=r"rows.json: expected an object with data alone, .*found version as well"):
        list(read_preferences(str(path)))
    path.write_text(json.dumps(LLMBAR, indent=indent))
    assert len(list(read_preferences(str(path)))) == 1


ODD_CELLS = [
    "a",
    'say "hi", twice',
    "two\nlines",
    "two\r\nlines",
    "2024-01-01",
    "007",
    "NA",
    "null",
    "[1, 2]",
    "[{",
    "a\tb",
]


@pytest.mark.parametrize(
    ("name", "delimiter"), [("rows.csv", ","), ("rows.tsv", "\t"), ("rows.csv.gz", ","), ("rows.tsv.zst", "\t")]
)
def test_cells_of_a_csv_are_texts(name, delimiter, tmp_path):
    """A reader that guesses types makes a number of 007 and nothing of NA; a label of such a file is a text."""
    plain = tmp_path / "plain"
    with plain.open("w", newline="") as file:
        rows = csv.writer(file, delimiter=delimiter)
        rows.writerow(["input", "output_1", "output_2", "label"])
        rows.writerows(["q", text, "b", "1"] for text in ODD_CELLS)
    (tmp_path / name).write_bytes(pack(plain.read_bytes(), Path(name).suffix))
    found = list(read_preferences(str(tmp_path / name)))
    assert [record.better for record in found] == ODD_CELLS
    assert found[-1].where == f"{tmp_path / name}: row {len(ODD_CELLS)}"


def test_messages_in_a_csv_are_json(tmp_path):
    """pandas writes lists with Python's quotes, from which the texts cannot be had back: read as text, they would be one
    long answer with its role in it."""
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({column: [json.dumps(turns)] for column, turns in TURNS.items()})
    frame.to_csv(tmp_path / "rows.csv", index=False)
    (record,) = read_preferences(str(tmp_path / "rows.csv"))
    assert (record.question, record.better, record.worse) == ("q", "a", "b")
    frame.map(lambda cell: json.dumps(json.loads(cell), indent=1)).to_csv(tmp_path / "rows.csv", index=False)
    assert [record.question for record in read_preferences(str(tmp_path / "rows.csv"))] == ["q"]
    pandas.DataFrame([TURNS]).to_csv(tmp_path / "rows.csv", index=False)
    with pytest.raises(
        InputError, match="rows.csv: row 1: expected messages as JSON, found a list as Python prints it"
    ):
        list(read_preferences(str(tmp_path / "rows.csv")))


@pytest.mark.parametrize(("content", "message"), [
    ("input,output_1,output_2,label\nq,a,b\n", "row 1: expected 4 cells, found 3"),
    ("input,input,output_2,label\nq,a,b,1\n", "column input stands twice"),
    ('input,output_1,output_2,label\nq,"a"b,b,1\n', "cannot be read"), ("input,output_1\n", "found none"),
])  # fmt: skip
def test_malformed_csv_is_one_line(content, message, tmp_path):
    (tmp_path / "rows.csv").write_text(content)
    with pytest.raises(InputError, match=f"rows.csv: .*{message}"):
        list(read_preferences(str(tmp_path / "rows.csv")))


def test_a_pattern_is_all_files_that_fit_it_in_order(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "sub/c.jsonl"):
        write(tmp_path / name, [LLMBAR | {"input": name}])
    assert [record.question for record in read_preferences(f"{tmp_path}/*.jsonl")] == ["a.jsonl", "b.jsonl"]
    assert len(list(read_preferences(f"{tmp_path}/**/*.jsonl"))) == 3
    assert describe_data([f"{tmp_path}/[ab].jsonl"]) == [f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl"]
    with pytest.raises(InputError, match="no file fits this pattern"):
        list(read_preferences(f"{tmp_path}/*.csv"))


def test_files_of_another_kind_in_a_folder_are_counted(tmp_path):
    """`datasets` takes the most frequent kind of file in a folder, and leaves the rest without a word."""
    for name in ("a.jsonl", "b.jsonl"):
        write(tmp_path / name, [LLMBAR])
    (tmp_path / "c.csv").write_text("input,output_1,output_2,label\nq,a,b,1\n")
    fates = Fates()
    assert len(list(read_preferences(str(tmp_path), fates=fates))) == 2
    assert (fates.counts, fates.examples) == ({"files_not_read": 1}, {"files_not_read": str(tmp_path / "c.csv")})


@pytest.mark.parametrize("name", ["rows.jsonl.zst", "rows.csv", "rows.ndjson"])
def test_a_folder_may_hold_files_of_any_kind(name, tmp_path):
    text = "input,output_1,output_2,label\nq,a,b,1\n" if ".csv" in name else json.dumps(LLMBAR)
    (tmp_path / name).write_bytes(pack(text.encode(), Path(name).suffix))
    assert len(list(read_preferences(str(tmp_path)))) == 1


def test_tables_and_folders_are_read_like_json(tmp_path):
    """Parquet, arrow, and what `save_to_disk` writes hold the same records as the JSON they came from."""
    import datasets

    rows = [LLMBAR | {"input": f"q{i}"} for i in range(3)]
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(tmp_path / "rows.parquet")
    table.save_to_disk(tmp_path / "saved")
    expected = list(read_preferences(write(tmp_path / "folder" / "rows.jsonl", rows)))
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    for data in (tmp_path / "rows.parquet", tmp_path / "saved", arrow, tmp_path / "folder"):
        assert list(read_preferences(str(data))) == expected


def test_split_is_train_unless_named(tmp_path):
    """A test split mixed into the training data would be measured on what was trained on."""
    for split in ("train", "test"):
        write(tmp_path / f"{split}.jsonl", [LLMBAR | {"input": split}])
    assert [record.question for record in read_preferences(str(tmp_path))] == ["train"]
    assert [record.question for record in read_preferences(f"{tmp_path}:test")] == ["test"]
    with pytest.raises(InputError, match="no split 'eval'.* one of train, test"):
        list(read_preferences(f"{tmp_path}:eval"))


def test_split_must_be_named_where_none_is_train(tmp_path):
    """RewardBench has the splits raw and filtered: either could be meant."""
    for split in ("raw", "filtered"):
        write(tmp_path / "data" / f"{split}-00000-of-00001.jsonl", [LLMBAR | {"input": split}])
    with pytest.raises(InputError, match="SPLIT with one of"):
        list(read_preferences(str(tmp_path)))
    assert [record.question for record in read_preferences(f"{tmp_path}:filtered")] == ["filtered"]


def test_limit_counts_rows(tmp_path):
    """`--limit 64` means 64 rows of the source, whatever becomes of them."""
    path = write(tmp_path / "rows.jsonl", [SAFERLHF] * 5)
    assert len(list(read_preferences(path, limit=2))) == 4


@pytest.mark.parametrize(("name", "content", "where"), [
    ("rows.jsonl", f"{json.dumps(LLMBAR)}\n" * 16 + '{"input": "q", \n' + json.dumps(LLMBAR), "17"),
    ("rows.json", json.dumps([LLMBAR] * 3, indent=1)[:-20], r"\d\d"),  # a pretty-printed array
])  # fmt: skip
def test_malformed_line_is_named(name, content, where, tmp_path):
    """Among 80,000 lines nobody finds the broken one by its content."""
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=rf"{name}:{where}: expected JSON, found"):
        list(read_preferences(str(tmp_path / name)))


@pytest.mark.parametrize(("row", "message"), [
    ({"input": "q", "output_1": "a", "label": 1}, "missing column output_2; found input, label, output_1"),
    (LLMBAR | {"label": None}, "expected a value in column label, found null"),
    (LLMBAR | {"label": 3}, "expected label to be one of 0, 1, 2; found 3"),
    (LLMBAR | {"label": True}, "found True"), (LLMBAR | {"label": "two"}, "found 'two'"),
    (LLMBAR | {"label": [2]}, r"found \[2\]"), (LLMBAR | {"input": 7}, "expected a question of text, found int"),
    (LLMBAR | {"output_2": {"text": "b"}}, "expected an answer of text, found dict"),
    ([1, 2], "expected a JSON object, found list"),
])  # fmt: skip
def test_bad_row_is_named(row, message, tmp_path):
    with pytest.raises(InputError, match=rf"rows\.jsonl:2: .*{message}"):
        records(LLMBAR, row, path=tmp_path)


@pytest.mark.parametrize("row", [
    {"chosen": [], "rejected": []}, {"chosen": "a", "rejected": "b"},
    {"chosen": [assistant("a")], "rejected": [assistant("b")]}, TURNS | {"prompt": "q", "rejected": []},
    {"prompt": [], "chosen": "a", "rejected": "b"}, {"prompt": "q", "chosen": ["a", "b", "c"], "rejected": "d"},
    {"prompt": "q", "chosen": [{"text": "a"}], "rejected": [assistant("b")]},
    {"prompt": "q", "chosen": ["a", "b"], "rejected": ["c"]},
    {"prompt": ["q"], "chosen": "a", "rejected": "b", "metadata": "text"},
])  # fmt: skip
def test_unreadable_chosen_and_rejected_are_an_input_error(row, tmp_path):
    with pytest.raises(InputError, match=r"rows\.jsonl:1: "):
        records(row, path=tmp_path)


def test_unknown_layout_lists_what_was_found_and_what_is_known(tmp_path):
    """The user has to name the columns, and must know which there could have been."""
    with pytest.raises(
        InputError, match="columns input, output_1 are of no known layout: name .*LLMBar .input, output_1"
    ):
        records({"input": "q", "output_1": "a"}, path=tmp_path)
    with pytest.raises(InputError, match="columns text, score are of no known layout: .*docs/data.md.$"):
        records({"text": "t", "score": 1}, path=tmp_path)


@pytest.mark.parametrize("content", ["", "\n\n", "[]"])
def test_empty_data_set_is_an_input_error(content, tmp_path):
    """Zero rows would otherwise surface stages later."""
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(InputError, match="expected at least one row, found none"):
        list(read_preferences(str(tmp_path / "rows.json")))


@pytest.mark.parametrize("name", ["nothing.jsonl", "/nothing/here", "./nothing", "a/b/c", "nothing.json.gz"])
def test_missing_file_is_not_looked_for_on_the_hub(name, monkeypatch):
    """A mistyped path must not wait for the network."""
    monkeypatch.setattr("datasets.load_dataset_builder", None)
    with pytest.raises(InputError, match="no such file or folder"):
        list(read_preferences(name))


def test_hub_failure_is_one_line(monkeypatch):
    """No network, no such data set, a gated one: all end in one line."""

    def fail(path, **settings):
        raise ConnectionError(f"Couldn't reach {path!r} on the Hub\nmore")

    monkeypatch.setattr("datasets.load_dataset_builder", fail)
    with pytest.raises(InputError, match=r"^nobody/nothing: .*Couldn't reach 'nobody/nothing' on the Hub$"):
        list(read_preferences("nobody/nothing:train"))


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.parquet", "rows.arrow", "rows.csv", "rows.jsonl"])
def test_file_of_other_content_is_an_input_error(name, tmp_path):
    """A file that is not what its name says ends in one line."""
    (tmp_path / name).write_bytes(b"\xff\xfe not this")
    with pytest.raises(InputError, match=name):
        list(read_preferences(str(tmp_path / name)))


@pytest.mark.parametrize(("name", "count"), [
    ("ultrafeedback", 1000), ("dpo_zh", 300), ("llmbar", 234), ("pandalm/testset-v1.json", 999),
    ("layouts/judgebench.jsonl", 3), ("layouts/rm_bench.json", 27),
    ("llmbar_judge_outputs/natural/GPT-4_CoT/result.json", 100),
])  # fmt: skip
def test_real_data_sets_are_read_whole(name, count):
    """Counts from the sources' own descriptions."""
    assert len(list(read_preferences(str(here(SHARED / name))))) == count


def test_a_cell_that_looks_like_deep_json_stays_text(tmp_path):
    cell = '[{"a":' + "[" * 100_000
    with open(tmp_path / "rows.csv", "w", newline="") as file:
        csv.writer(file).writerows([["prompt", "chosen", "rejected"], ["q", cell, "b"]])
    assert [record.better for record in read_preferences(str(tmp_path / "rows.csv"))] == [cell]
