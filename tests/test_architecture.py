"""The rules that the repository keeps, read off its syntax trees."""

import ast
import dataclasses
import re
import typing
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

import conj
from conj import InputError
from conj.data.options import flag, parse_options
from conj.settings import COMMANDS

PACKAGE = Path(conj.__file__).parent
ROOT = PACKAGE.parent
ALLOWED = {
    "data": ("conj.data",),
    "model": ("conj.model", "conj.data.files", "conj.data.model_files"),
    "train": ("conj.train", "conj.model", "conj.data"),
    "sample": ("conj.sample", "conj.data", "conj.model.folder"),
}
# What a model folder says is read with the tokenizer's rules and refused in the words of the options.
FOLDER = ("conj.data.options", "conj.data.tokenizer")
ENGINE = (
    "model max_new_tokens max_length max_num_seqs max_num_batched_tokens device dtype tensor_parallel_size "
    "pipeline_parallel_size gpu_memory_utilization "
)
FLEET = ENGINE + "num_engines ray_address "
ENDPOINT = "base_url max_concurrency requests_per_minute max_retries request_timeout "
COMPUTE = "device dtype attention kernels "
RUN = "run_dir from_runs "
SAMPLING = "temperature top_p top_k repetition_penalty seed api_model " + FLEET + ENDPOINT
OPTIONS = {  # their order is that of the help alone
    "preprocess": RUN + "both_orders columns data exclude seed subsets limit",
    "repeated": RUN + "judge " + SAMPLING + "num_samples parser structured_output",
    "hinted": RUN + "judge " + SAMPLING,
    "pairs": RUN + "judge thoughts max_right_vs_wrong max_right_vs_unparsed max_hinted pair_types chosen_length rationale eval_fraction seed",
    "reference": RUN + COMPUTE + "judge dp_shard_size model max_length max_tokens_per_pack save_every",
    "dpo": RUN + COMPUTE + "judge dp_shard_size " + (
        "model beta nll_alpha learning_rate adam_beta1 adam_beta2 weight_decay warmup_ratio max_grad_norm "
        "num_train_epochs max_steps pairs_per_step max_length max_tokens_per_pack pack_multiple balanced_packs share "
        "activation_checkpointing reshard_after_forward cpu_offload deterministic audit_mode eval_steps eval_pairs save_every keep_checkpoints report_to seed"
    ),
    "evaluate": RUN + FLEET + ENDPOINT + (
        "data subsets limit judge "
        "judge_text name judgments parser num_samples temperature verdict_probability structured_output seed num_resamples"
    ),
    "audit": "run_dir model device num_pairs replay reference against seed",
    "push": "run_dir repo_id private revision",
    "attacks": RUN + FLEET + "judge data subsets limit parser seed num_resamples",
    "judge": ENGINE + "judge question answer_1 answer_2 structured_output",
}  # fmt: skip
RECIPE = {  # the published recipe, and where ours differs on purpose (DESIGN, README)
    "preprocess": {"seed": 2021},
    "repeated": {"num_samples": 8, "temperature": 1.2, "top_p": 0.95, "top_k": 50, "repetition_penalty": 1.0},
    "hinted": {"temperature": 1.0, "top_p": 0.9, "top_k": 0, "max_new_tokens": 512},
    "pairs": {"max_right_vs_wrong": 3, "max_right_vs_unparsed": 1, "max_hinted": 1},
    "dpo": {
        "beta": 0.1, "learning_rate": 5e-7, "adam_beta1": 0.9, "adam_beta2": 0.95, "weight_decay": 1e-4,
        "warmup_ratio": 0.03, "max_grad_norm": 1.0, "dtype": "bfloat16", "num_train_epochs": 1, "pairs_per_step": 24,
        "max_length": 6400, "nll_alpha": 0.0,
    },
}  # fmt: skip


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def files(*parts: str) -> list[Path]:
    return sorted(PACKAGE.joinpath(*parts).rglob("*.py"))


@pytest.mark.parametrize("part", ALLOWED)
def test_imports_go_one_way(part):
    """train → model, data; sample → data and what a model folder says. Anything else ties the trainer to the sampler, or
    the data to torch runs."""
    for path in files(part):
        allowed = ALLOWED[part] + (FOLDER if path.name in ("folder.py", "config.py") and part == "model" else ())
        for name in imports(path):
            if name.startswith("conj.") and (PACKAGE / name.split(".")[1]).is_dir():
                assert name.startswith(tuple(f"{module}." for module in allowed)), f"{path.name} imports {name}"


@pytest.mark.parametrize(("package", "place"), [("vllm", "vllm.py"), ("ray", "ray_cluster.py")])
def test_an_engine_is_imported_in_one_place(package, place):
    assert [p.name for p in files() if any(n.split(".")[0] == package for n in imports(p))] == [place]


def test_data_knows_no_processes():
    assert not [p.name for p in files("data") if any(n.startswith("torch.distributed") for n in imports(p))]


def test_nothing_unpickles():
    """Weights, checkpoints and references come from strangers: no pickle, no torch.load, no remote code."""
    for path in files():
        assert not {n.split(".")[0] for n in imports(path)} & {"pickle", "dill", "joblib", "shelve"}, path
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) != ("torch", "load"), path
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert isinstance(node.value, ast.Constant) and node.value.value is False, path


@pytest.mark.parametrize("command", OPTIONS)
def test_the_options_of_a_command_are_these_documented_and_read(command):
    """An option that nothing reads is a promise that nothing keeps; one that disappears breaks a user's script."""
    used = {
        node.attr
        for path in files()
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("options", "self")
    }
    fields = dataclasses.fields(COMMANDS[command].load_options())
    assert sorted(field.name for field in fields) == sorted(OPTIONS[command].split())
    for field in fields:
        assert field.metadata["help"], field.name
        assert field.name in used, field.name


@pytest.mark.parametrize("command", RECIPE)
def test_the_defaults_are_the_recipe(command):
    """A default that drifts makes another method of it, and nobody would see."""
    kind = COMMANDS[command].load_options()
    needed = {name: Path("given") for name in ("run_dir", "model") if name in kind.__dataclass_fields__}
    if command == "preprocess":
        needed["data"] = ("given",)
    options = kind(**needed)
    assert {name: getattr(options, name) for name in RECIPE[command]} == RECIPE[command]


@pytest.mark.parametrize("command", OPTIONS)
def test_every_choice_of_every_option_is_taken_on_the_command_line(command):
    """A choice that may also be absent is of another type, and was once refused on every command line."""
    kind = COMMANDS[command].load_options()
    hints = typing.get_type_hints(kind)
    needed = [part for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING for part in (flag(f), "1")]
    for field in dataclasses.fields(kind):
        parts = [hints[field.name], *typing.get_args(hints[field.name])]
        for literal in (part for part in parts if typing.get_origin(part) is typing.Literal):
            for choice in typing.get_args(literal):
                try:
                    options = parse_options(kind, [*needed, flag(field), choice])
                except InputError as e:  # of two options that exclude each other
                    assert "see --help" not in str(e), e
                else:
                    assert getattr(options, field.name) in (choice, (choice,))


def readme_tree() -> tuple[set[str], set[str]]:
    """The folders and the files of the tree in the README: a folder opens a line, what is below it follows."""
    text = (ROOT / "README.md").read_text("utf-8").partition("## Read the code")[2].split("```")[1]
    folders, named, folder = set(), set(), ""
    for line in text.strip().splitlines():
        head = line.split()[0]
        if not line.startswith(" "):
            folder = head if head.endswith("/") else ""
            folders |= {folder.rstrip("/")} - {""}
        named |= {folder + name for name in re.findall(r"[\w/]+\.(?:py|sh|md)\b", line)}
    return folders, named


def test_the_readme_names_every_module_and_folder_and_nothing_else():
    """A map that lacks a place, or shows one that is gone, is worse than none."""
    folders, named = readme_tree()
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().split()] + [".*"]
    on_disk = {path.name for path in ROOT.iterdir() if path.is_dir()} | {
        path.parent.relative_to(ROOT).as_posix() for path in files() if path.name == "__init__.py"
    }
    assert folders | {"conj"} == {name for name in on_disk if not any(fnmatchcase(name, what) for what in ignored)}
    modules = {path.relative_to(ROOT).as_posix() for path in files() if path.name != "__init__.py"}
    assert {name for name in named if name.startswith("conj/")} == modules
    assert not [name for name in named if not (ROOT / name).is_file()]


def test_every_package_says_in_one_line_what_lives_there():
    for path in files():
        if path.name == "__init__.py":
            doc = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
            assert doc.endswith(".") and len(doc.splitlines()[0]) > 20, path


def test_no_file_is_longer_than_350_lines():
    """A longer one holds two things, and is read by nobody from top to bottom."""
    sources = [path for part in ("conj", "scripts") for end in ("py", "sh") for path in (ROOT / part).rglob(f"*.{end}")]
    assert not [path.name for path in sources if len(path.read_text("utf-8").splitlines()) > 350]
