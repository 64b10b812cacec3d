"""The fuzzer finds what it looks for, and does not find it in conj. Long runs: scripts/fuzz.py."""

import json

import fuzz
import pytest
from fuzz_verdicts import fuzz_verdict

from conj.data import model_files
from conj.data.verdicts import Form, Verdict, parse_released


def run(target, num_inputs: int) -> fuzz.Tally:
    tally = fuzz.Tally()
    for number in range(num_inputs):
        fuzz.run_one(target, fuzz.input_bytes(7, number), number, tally)
    return tally


def test_judgments_have_the_verdict_they_state_or_none():
    tally = run(fuzz_verdict, 5000)
    assert not tally.findings and min(tally.counts["accepted"], tally.counts["refused"]) > 1000


def first_digit(text: str, form: Form, opened: bool) -> Verdict:
    digits = [c for c in text if c in "12"]
    return Verdict(int(digits[0]), "json") if digits else Verdict(None, "none")


@pytest.mark.parametrize("parse", [parse_released, first_digit])
def test_a_parser_that_reads_verdicts_out_of_reasons_is_found_out(parse):
    tally = run(lambda data: fuzz_verdict(data, parse), 500)
    assert tally.counts["invented"] > 20


def test_damaged_model_folders_are_read_or_refused_in_a_line(tmp_path):
    tally = run(fuzz.prepare("model-folder", tmp_path), 400)
    assert not tally.findings and min(tally.counts["accepted"], tally.counts["refused"]) > 40


def test_a_reader_that_takes_keys_twice_is_found_out(tmp_path, monkeypatch):
    target = fuzz.prepare("model-folder", tmp_path)
    monkeypatch.setattr(model_files, "_parse_object", lambda data, path: json.loads(data))
    assert run(target, 400).counts["invented"] > 3
