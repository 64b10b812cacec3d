"""The audit finds what was changed, by name, and holds where nothing was."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import command, random_pairs, succeeds, write_model
from safetensors.torch import load_file, save_file
from test_dpo import dpo_options, make_reference, one_ulp

from conj.data import manifest, tokens
from conj.data.card import CARD, write_card
from conj.data.files import read_jsonl, write_jsonl
from conj.data.identity import describe_input, describe_made, hash_input
from conj.data.manifest import list_artefacts, manifest_path, read_manifest, read_sealed, write_sealed
from conj.data.packs import pairs_of
from conj.data.tokenizer import JudgeTokenizer
from conj.model.backends import rounds_rows_alike
from conj.train import dpo
from conj.train.audit import __main__ as audit
from conj.train.audit import training
from conj.train.audit.chain import Check
from conj.train.checkpoint import list_checkpoints
from conj.train.options import AuditOptions
from conj.train.sharding import distributed

STEPS = 8


def train(run: Path, base: Path, **changes) -> None:
    """Reference and training, on a pairs.jsonl with a manifest, as stage 4 leaves it."""
    rows = read_jsonl(run / "pairs.jsonl")
    write_sealed(manifest_path(run / "pairs.jsonl"), {"inputs": [], "options": {}, "complete": False})
    manifest.finish(run / "pairs.jsonl", num_rows=len(rows), counts={}, seconds=0.0)
    make_reference(run, base)
    settings = dict(max_steps=STEPS, save_every=3, keep_checkpoints=9, num_train_epochs=2)
    dpo.main(dpo_options(run, base, **settings | changes))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Path]:
    """A run of 8 steps with checkpoints at 3, 6 and 8, and its base."""
    base = write_model(tmp_path_factory.mktemp("base") / "base")
    run = tmp_path_factory.mktemp("runs") / "run"
    write_jsonl(run / "pairs.jsonl", random_pairs(30))
    train(run, base)
    return run, base


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy that a test may damage; its base stays where it is."""
    return Path(shutil.copytree(trained[0], tmp_path / "run"))


def audited(run: Path, **options) -> tuple[bool, dict[str, Check]]:
    """Whether the audit ends well, and its checks by name."""
    try:
        audit.main(AuditOptions(run_dir=run, device="cpu", **options))
        ended_well = True
    except SystemExit as e:
        assert e.code == 1
        ended_well = False
    content = json.loads((run / "audit.json").read_text())
    assert content["holds"] is ended_well
    return ended_well, {c["name"]: Check(**c) for c in content["checks"]}


def broken(checks: dict[str, Check]) -> list[str]:
    return [name for name, check in checks.items() if check.outcome == "BROKEN"]


def reseal(run: Path) -> None:
    """Manifests and a card that fit a changed run: what someone would do who hides a change. Only the numbers still tell."""
    for artefact in list_artefacts(run):
        made = read_manifest(artefact)
        made |= describe_made(artefact)
        made["also"] = {name: hash_input(run / name) for name in made.get("also", {})}
        for entry in made["inputs"]:
            path = run / Path(entry["path"]).name
            entry |= describe_input(path if path.exists() and path.name != "base" else Path(entry["path"]))
        write_sealed(manifest_path(artefact), made)
    write_card(run)


def test_an_undisturbed_run_holds_in_every_check(run, capsys):
    holds, checks = audited(run, replay=5, reference=True)
    assert holds and {check.outcome for check in checks.values()} == {"holds"}
    names = ["pairs.jsonl", "reference.safetensors", "model", "tokens.safetensors"]
    names += [
        "checkpoints/step-00000003",
        "checkpoints/step-00000006",
        "checkpoints/step-00000008",
        "model/README.md",
        "tokens.safetensors from the pairs",
        "reference key",
        "step 0",
        "data order",
        "exported weights",
    ]
    names += ["replay of steps 4 to 8", "ids by transformers", "reference by transformers", "loss by transformers"]
    assert list(checks) == names
    assert checks["replay of steps 4 to 8"].found == "log and 2 checkpoints bit for bit"
    how = "bit for bit" if rounds_rows_alike(torch.device("cpu")) else "within rounding"
    assert f"holds      step 0: 64 pairs have the stored logprobs {how}" in capsys.readouterr().out


def test_a_run_by_two_ranks_is_replayed_by_two_ranks_bit_for_bit(trained, tmp_path):
    """One rank replays it within the stated tolerance: sums of other shards round otherwise."""
    run, base = tmp_path / "run", trained[1]
    write_jsonl(run / "pairs.jsonl", random_pairs(30))
    make_reference(run, base)
    arguments = ["--dtype", "float32", "--learning-rate", "1e-3", "--pairs-per-step", "6", "--max-steps", "4"]
    succeeds("conj.train.dpo", *arguments, "--run-dir", run, "--model", base, ranks=2)
    for ranks, how in ((2, "bit for bit"), (None, "within 0.001, since this is another machine or version")):
        done = command("conj.train.audit", "--run-dir", run, "--replay", "4", ranks=ranks)
        assert done.returncode == 0 and f"log and 1 checkpoints {how}" in done.stdout, done.stdout + done.stderr


def flip(path: Path, place: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


TAMPERED = {  # file: the first broken link
    "pairs.jsonl": "pairs.jsonl",
    "pairs.jsonl.manifest.json": "pairs.jsonl",
    "reference.safetensors": "reference.safetensors",
    "reference.safetensors.manifest.json": "reference.safetensors",
    "tokens.safetensors": "tokens.safetensors",
    "metrics.jsonl": "model",
    "model/model.safetensors": "model",
    "model/config.json": "model",
    "model/tokenizer.json": "model",
    "model/README.md": "model/README.md",
    "model.manifest.json": "model",
    "checkpoints/step-00000003/rank-00000.safetensors": "checkpoints/step-00000003",
    "checkpoints/step-00000006/manifest.json": "model",
    "checkpoints/step-00000008/rank-00000.safetensors": "checkpoints/step-00000008",
}


@pytest.mark.parametrize("name", TAMPERED)
def test_a_flipped_bit_in_any_artefact_is_found_and_the_first_broken_link_named(name, run, capsys):
    """In the middle of the file, at its end and at its start."""
    size = (run / name).stat().st_size
    for place in (size // 2, -1, 0):
        flip(run / name, place)
        holds, checks = audited(run)
        assert not holds and broken(checks)[0] == TAMPERED[name], (name, place)
        assert f"first broken link: {TAMPERED[name]}: " in capsys.readouterr().out
        flip(run / name, place)
    assert audited(run)[0]


def test_tokens_that_are_not_those_of_the_pairs_are_found_also_where_their_hash_fits(run, trained):
    """A pair that is held out here and trained on there, written by who knows the format. One that was deleted is no
    failure: it is made again for the audit, elsewhere."""
    before = sorted(path.name for path in run.iterdir())
    rows = read_jsonl(run / "pairs.jsonl")
    write_jsonl(run / "others.jsonl", [rows[0] | {"split": "eval"}, *rows[1:]])
    judge = JudgeTokenizer.load(trained[1])
    key = tokens.tokens_key(run / "pairs.jsonl", judge, 600)
    tokens.write_tokens(run / tokens.TOKENS, run / "others.jsonl", judge, 600, key)
    (run / "others.jsonl").unlink()
    _, checks = audited(run)
    assert broken(checks) == ["tokens.safetensors from the pairs"]
    (run / tokens.TOKENS).unlink()
    holds, checks = audited(run)
    assert holds and not [name for name in checks if name.startswith(tokens.TOKENS)]
    assert sorted(path.name for path in run.iterdir()) == sorted({*before, "audit.json"} - {tokens.TOKENS})


def test_a_change_in_the_base_is_found_where_it_was_first_read(run, trained, tmp_path):
    base = shutil.copytree(trained[1], tmp_path / "other")
    one_ulp(base / "model.safetensors")
    holds, checks = audited(run, model=base)
    assert not holds and broken(checks)[0] == "reference.safetensors"
    assert "was made from another" in checks["model"].found


def test_a_moved_run_and_base_hold(run, trained, tmp_path):
    moved = shutil.move(run, tmp_path / "elsewhere")
    assert audited(moved, model=shutil.copytree(trained[1], tmp_path / "base moved"))[0]


@pytest.mark.parametrize("name", ["run", "second"])
def test_a_run_on_a_base_that_conj_trained_holds_with_the_run_that_it_is_of(name, run, tmp_path):
    """Also where both have the same name. Negative control: a change in the first one's log."""
    second = tmp_path / "on it" / name
    write_jsonl(second / "pairs.jsonl", random_pairs(12))
    train(second, run / "model", max_steps=2)
    holds, checks = audited(second)
    assert holds and checks[str(run / "model")].outcome == checks["model"].outcome == "holds"
    with open(run / "metrics.jsonl", "a") as file:
        file.write("\n")
    assert broken(audited(second)[1]) == [str(run / "model")]


def test_what_was_deleted_to_save_room_is_unchecked_and_no_failure(run, trained):
    """A checkpoint as a whole, and the base: the audit says what it could not check, and checks the rest."""
    shutil.rmtree(run / "checkpoints" / "step-00000003")
    holds, checks = audited(run)
    assert holds and "not here, so not compared: checkpoints/step-00000003/manifest.json" in checks["model"].found
    shutil.rmtree(run / "checkpoints")
    holds, checks = audited(run)
    assert holds and checks["exported weights"].outcome == "unchecked" and checks["step 0"].outcome == "holds"
    for artefact in ("model", "reference.safetensors"):
        made = read_manifest(run / artefact)
        made["inputs"][-1]["path"] = "nowhere/base"
        write_sealed(manifest_path(run / artefact), made)
    holds, checks = audited(run)
    assert holds and checks["training"].outcome == "unchecked"
    assert "name its folder with --model" in checks["training"].found
    assert audited(run, model=trained[1])[1]["step 0"].outcome == "holds"


@pytest.mark.parametrize("name", [
    "model.manifest.json", "reference.safetensors.manifest.json", "checkpoints/step-00000003/manifest.json", "metrics.jsonl",
])  # fmt: skip
def test_a_deleted_manifest_or_log_is_found(name, run):
    (run / name).unlink()
    holds, checks = audited(run)
    assert not holds and broken(checks)[0] == ("reference.safetensors" if "reference" in name else "model")


# ---- Changes whose manifests fit: only the numbers tell ----


def edit_manifest(run: Path, **options) -> None:
    made = read_manifest(run / "model")
    write_sealed(manifest_path(run / "model"), made | {"options": made["options"] | options})
    write_card(run)


def test_a_learning_rate_other_than_the_one_stated_is_found_at_the_first_step(run):
    edit_manifest(run, learning_rate=2e-3)
    _, checks = audited(run, replay=8)
    assert "step 1: learning_rate: expected 0.002 by seed and options, found 0.001" in checks["data order"].found
    assert checks["replay of steps 1 to 8"].found.startswith("step 1: learning_rate")


def test_a_beta_other_than_the_one_stated_is_found_at_the_step_where_it_shows(run):
    """At step 1 every margin is 0 and the loss does not know beta; the gradient does."""
    edit_manifest(run, beta=0.2)
    assert audited(run)[0]  # what is checked without training again cannot tell
    _, checks = audited(run, replay=8)
    assert checks["replay of steps 1 to 8"].found.startswith("step 1: grad_norm")


def test_another_seed_is_found_in_the_order_of_the_data(run):
    edit_manifest(run, seed=1)
    assert "step 1: order: expected" in audited(run)[1]["data order"].found


def test_a_pair_with_its_judgments_swapped_is_found_at_its_step(run, trained):
    """pairs.jsonl, reference and all manifests changed to fit: the log is of the training that took place."""
    rows = read_jsonl(run / "pairs.jsonl")
    with distributed("cpu") as world:
        steps = dpo.make_plan(dpo_options(run, trained[1], num_train_epochs=2, max_steps=STEPS), world).steps
    first, swapped = 3, pairs_of(steps[2])[0]
    assert swapped not in [pair for packs in steps[:2] for pair in pairs_of(packs)]
    rows[swapped] |= {"chosen": rows[swapped]["rejected"], "rejected": rows[swapped]["chosen"]}
    write_jsonl(run / "pairs.jsonl", rows)
    (run / "reference.safetensors").unlink()
    manifest_path(run / "reference.safetensors").unlink()
    made = read_manifest(run / "pairs.jsonl")
    write_sealed(manifest_path(run / "pairs.jsonl"), made | {"sha256": hash_input(run / "pairs.jsonl")})
    make_reference(run, trained[1])
    reseal(run)
    _, checks = audited(run, replay=8)
    assert broken(checks) == ["replay of steps 1 to 8"]
    assert checks["replay of steps 1 to 8"].found.startswith(f"step {first}: ")


def test_a_changed_weight_in_a_checkpoint_is_named(run):
    """The last checkpoint and the exported weights, changed alike and resealed: the replay ends elsewhere."""
    path = list_checkpoints(run / "checkpoints")[0]
    state = load_file(path / "rank-00000.safetensors")
    state["weight.model.norm.weight"][3] += 0.5
    save_file(state, path / "rank-00000.safetensors")
    weights = load_file(run / "model" / "model.safetensors")
    weights["model.norm.weight"][3] += 0.5
    save_file(weights, run / "model" / "model.safetensors", metadata={"format": "pt"})
    made = read_sealed(path / "manifest.json", {})
    made["files"][0]["sha256"] = hash_input(path / "rank-00000.safetensors")
    write_sealed(path / "manifest.json", made)
    reseal(run)
    assert audited(run)[0]
    _, checks = audited(run, replay=2)
    assert "step 8: weight.model.norm.weight differs" in checks["replay of steps 7 to 8"].found


def test_weights_that_are_not_the_last_checkpoints_are_named(run):
    one_ulp(run / "model" / "model.safetensors")
    reseal(run)
    _, checks = audited(run)
    assert "model.norm.weight is not step-00000008's" in checks["exported weights"].found


def test_a_card_that_a_kill_kept_from_being_written_is_written_by_the_same_command(run, trained):
    (run / CARD).rename(run / ".card")
    base, settings = trained[1], {"max_steps": STEPS, "save_every": 3, "keep_checkpoints": 9, "num_train_epochs": 2}
    dpo.main(dpo_options(run, base, **settings))
    assert audited(run)[1][CARD].outcome == "holds" and not (run / ".card").exists()


def test_the_card_gets_the_audits_result_unless_it_was_edited(run):
    """An edited card is left as it is: it is what there is to look into."""
    before = (run / CARD).read_text()
    assert "Not audited." in before
    assert audited(run)[0]
    card = (run / CARD).read_text()
    assert (
        "Not audited." not in card
        and "the run holds" in card
        and "| holds | pairs.jsonl, reference.safetensors" in card
    )
    assert audited(run)[0]
    edited = card.replace("| optimizer steps | 8 |", "| optimizer steps | 9 |")
    (run / CARD).write_text(edited)
    holds, checks = audited(run)
    assert not holds and broken(checks) == [CARD] and "expected '| optimizer steps | 8 |', found" in checks[CARD].found
    assert checks["step 0"].outcome == "holds" and (run / CARD).read_text() == edited
    write_card(run)
    assert "**broken**" in (run / CARD).read_text()
    flip(run / "pairs.jsonl.manifest.json")
    assert audited(run)[1][CARD].outcome == "unchecked"


# ---- Two runs ----


def swap_a_pair(run: Path, base: Path) -> None:
    rows = read_jsonl(run / "pairs.jsonl")
    rows[4] |= {"chosen": rows[4]["rejected"], "rejected": rows[4]["chosen"]}
    write_jsonl(run / "pairs.jsonl", rows)


def change_the_template(run: Path, base: Path) -> None:
    path = base / "tokenizer_config.json"
    path.write_text(path.read_text().replace("assistant", "helper"))


PARTINGS = {  # what another run does otherwise, and what is said of its pairs, its reference and its training
    "nothing": (None, {}, ["holds"], ["holds"], ["holds"]),
    "the learning rate": (
        None, {"learning_rate": 5e-4}, ["holds"], ["holds"],
        ["BROKEN", "option learning_rate: 0.001 and 0.0005", "metrics.jsonl:1: step 1: learning_rate: 0.001 and 0.0005",
         "weights: tensor"],
    ),
    "a pair": (
        swap_a_pair, {}, ["BROKEN: pairs.jsonl:5: id p", ": chosen: "], ["BROKEN", "key: another tokens"], ["BROKEN"],
    ),
    "the template": (
        change_the_template, {}, ["holds"],
        ["BROKEN", ": tokenizer_config.json differs in chat_template", "key: another tokenizer, tokens"], ["BROKEN"],
    ),
    "a weight": (
        lambda run, base: one_ulp(base / "model.safetensors"), {}, ["holds"],
        ["BROKEN", ": tensor model.norm.weight differs by up to", "key: another weights"], ["BROKEN"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", PARTINGS)
def test_two_runs_part_where_they_differ_and_what_differs_is_named(what, run, trained, tmp_path):
    spoil, changes, *expected = PARTINGS[what]
    other, base = tmp_path / "other", Path(shutil.copytree(trained[1], tmp_path / "other base"))
    write_jsonl(other / "pairs.jsonl", random_pairs(30))
    if spoil:
        spoil(other, base)
    train(other, base, **changes)
    found = [c for c in audited(run, against=other)[1].values() if c.name.startswith("against")]
    for check, parts in zip(found, expected, strict=True):
        said = f"{check.outcome}: {check.found}"
        assert said.startswith(parts[0]) and all(part in said for part in parts), said


# ---- The command ----


def test_the_command_exits_with_0_1_and_2(run, tmp_path):
    done = command("conj.train.audit", "--run-dir", run)
    assert done.returncode == 0 and "BROKEN" not in done.stdout, done.stderr
    done = command("conj.train.audit", "--run-dir", run, "--replay", "99")
    assert done.returncode == 2 and "--replay: expected at most 8 steps, found 99" in done.stderr
    flip(run / "metrics.jsonl", 10)
    assert command("conj.train.audit", "--run-dir", run).returncode == 1
    done = command("conj.train.audit", "--run-dir", tmp_path / "nowhere")
    assert done.returncode == 2 and "expected a run folder with manifests" in done.stderr


def test_a_reference_made_by_other_code_is_replayed_within_the_tolerance(run, monkeypatch):
    """As on another machine: what differs is said, and a difference beyond rounding is still found."""
    key = training.make_plan.__globals__["reference_key"]
    elsewhere = lambda *a, **k: key(*a, **k) | {"torch": "9.9"}  # noqa: E731
    monkeypatch.setitem(training.make_plan.__globals__, "reference_key", elsewhere)
    holds, checks = audited(run, replay=2)
    assert holds and "made elsewhere: another torch" in checks["reference key"].found
    assert "within 0.001" in checks["replay of steps 7 to 8"].found
    edit_manifest(run, learning_rate=1.2e-3)
    assert broken(audited(run, replay=2)[1]) == ["data order", "replay of steps 7 to 8"]
