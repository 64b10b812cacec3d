"""The rules that the repository keeps, read off its syntax trees."""

import ast
import dataclasses
import importlib
from pathlib import Path

import pytest

import conj

PACKAGE = Path(conj.__file__).parent
ALLOWED = {
    "data": {"data"},
    "model": {"model", "data"},  # of data, only the file helpers; see below
    "train": {"train", "model", "data"},
    "sample": {"sample", "data"},
}
STAGES = [
    "conj.data.preprocess",
    "conj.sample.repeated",
    "conj.sample.hinted",
    "conj.data.pairs",
    "conj.train.reference",
    "conj.train.dpo",
    "conj.sample.evaluate",
    "conj.sample.judge",
]


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
    """train → model, data; sample → data. Anything else ties the trainer to the sampler, or the data to torch runs."""
    for path in files(part):
        for name in imports(path):
            pieces = name.split(".")
            if pieces[0] == "conj" and len(pieces) > 1 and (PACKAGE / pieces[1]).is_dir():
                assert pieces[1] in ALLOWED[part], f"{path.name} imports {name}"
                if part == "model" and pieces[1] == "data":
                    assert pieces[2] == "files", f"{path.name} imports {name}"


def test_vllm_is_imported_in_one_place():
    assert [p.name for p in files() if any(n.split(".")[0] == "vllm" for n in imports(p))] == ["engine.py"]


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


def options_class(stage: str) -> type:
    module = importlib.import_module(stage)
    found = [
        c for c in vars(module).values() if isinstance(c, type) and c.__module__ == stage and "Options" in c.__name__
    ]
    return max(found, key=lambda c: len(c.__mro__))


@pytest.mark.parametrize("stage", STAGES)
def test_every_option_is_documented_and_read(stage):
    """An option that nothing reads is a promise that nothing keeps."""
    used = {
        node.attr
        for path in files()
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Attribute)
    }
    for field in dataclasses.fields(options_class(stage)):
        assert field.metadata["help"], field.name
        assert field.name in used, field.name
