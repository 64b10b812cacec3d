"""The command line: what it takes, what it says, and that it is quick."""

import dataclasses
import os
import subprocess
import sys

import pytest
from conftest import ROOT, assert_one_line_error, command

from conj import InputError, __version__
from conj.__main__ import build_app
from conj.data.options import flag, parse_options
from conj.data.pairs import PairsOptions
from conj.settings import COMMANDS
from conj.train.options import DPOOptions

NEEDED = ["--run-dir", "r", "--model", "m"]


def conj(*arguments) -> subprocess.CompletedProcess:
    return command("conj", *arguments)


def dpo(*arguments) -> DPOOptions:
    return parse_options(DPOOptions, [*NEEDED, *arguments])


def test_an_option_is_taken_as_users_of_other_tools_write_it():
    """With dashes or underscores, with = or a space; the last of two counts, lists may be given in parts."""
    for line in (["--learning-rate", "1e-6"], ["--learning_rate=1e-6"], ["--learning-rate=3", "--learning-rate=1e-6"]):
        assert dpo(*line).learning_rate == 1e-6
    assert not parse_options(PairsOptions, ["--run-dir", "r", "--no-rationale"]).rationale
    types = parse_options(PairsOptions, ["--run-dir", "r", "--pair-types", "hinted", "--pair-types", "repeated"])
    assert types.pair_types == ("hinted", "repeated")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--learning-rat", "1"], "Unknown option: --learning-rat. Did you mean --learning-rate?"),
        (["--beta", "x"], 'Invalid value for --beta: unable to convert "x" into float'),
        (["--beta", "nan"], "--beta. Expected a finite number, found nan"),
        (["--beta", "-1"], "--beta: expected more than 0, found -1.0"),
        (["--share", "all"], 'Invalid value "all" for --share. Choose from: "prompt", "pair", "none"'),
        (["--beta"], "--beta requires an argument"),
    ],
)
def test_a_mistake_on_the_line_is_named(line, message):
    with pytest.raises(InputError) as raised:
        dpo(*line)
    assert message in str(raised.value)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_every_option_with_its_default_and_required_ones_first(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    kind = COMMANDS[name].load_options()
    with pytest.raises(SystemExit) as left:
        parse_options(kind, ["--help"])
    assert not left.value.code
    text = capsys.readouterr().out
    lines = {line.split()[1]: line for line in text.splitlines() if line.startswith("│ --") or "--" in line[:8]}
    for field in dataclasses.fields(kind):
        if not field.metadata["positional"]:
            assert flag(field) in text, field.name
            if field.default not in (dataclasses.MISSING, None, ()) and flag(field) in lines:
                assert "[default: " in lines[flag(field)], field.name
    if any(field.default is dataclasses.MISSING for field in dataclasses.fields(kind)):
        assert text.index("╭─ Required") < text.index("╭─ ", text.index("╭─ Required") + 1)


def test_conj_names_its_commands_at_once_and_without_torch():
    """`conj --help` reads docstrings; importing torch for them would cost seconds."""
    said = conj("--help").stdout
    assert [name for name in COMMANDS if f"│ {name} " not in said] == []
    code = "import sys; sys.argv = ['conj', '--help']; from conj.__main__ import main; main(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert not {"torch", "vllm", "datasets", "transformers", "numpy"} & set(done.stdout.splitlines()[-1].split())


def cpu_seconds_of(*line) -> float:
    before = os.times()
    subprocess.run(line, capture_output=True, cwd=ROOT, check=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def test_conj_help_takes_hardly_more_than_that_of_an_app_without_commands():
    """Seconds would be the machine's: one that is busy took 0.5 for what another does in 0.3."""
    empty = "import cyclopts; cyclopts.App(result_action='return_value')(['--help'])"
    lines = [(sys.executable, "-m", "conj", "--help"), (sys.executable, "-c", empty)]
    ours, least = map(min, zip(*([cpu_seconds_of(*line) for line in lines] for _ in range(5))))
    assert ours < 1.25 * least, (ours, least)


def test_conj_and_python_m_are_the_same_command(tmp_path):
    """torchrun takes modules; people type `conj dpo`."""
    lines = [("conj", "pairs", "--run-dir", tmp_path), ("conj.data.pairs", "--run-dir", tmp_path)]
    first, second = (command(*line) for line in lines)
    assert_one_line_error(first, "hinted.jsonl: no such file")
    assert (first.stdout, first.stderr, first.returncode) == (second.stdout, second.stderr, second.returncode)
    assert conj("--version").stdout == conj("dpo", "--version").stdout == f"conj {__version__}\n"


def test_a_mistyped_command_is_one_line():
    assert_one_line_error(conj("evalate"), 'Unknown command "evalate". Did you mean "evaluate"?')


def test_the_shell_completes_commands_and_their_options():
    script = build_app(with_options=True).generate_completion(shell="bash")
    assert "preprocess" in script and "--learning-rate" in script and "--max-hinted" in script


def test_it_does_not_matter_who_has_imported_pydantic():
    """cyclopts validates by pydantic where that is loaded, as vLLM does; an option that is not given was once refused then."""
    pytest.importorskip("pydantic")
    assert dpo("--beta", "0.2").attention is None
