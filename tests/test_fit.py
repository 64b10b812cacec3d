"""Automatic options, and what is refused before weights load: by the ranks and the memory that there are."""

import dataclasses
import shutil
import types
from array import array

import pytest
import torch
from bench_common import QWEN2, config_of
from conftest import command, succeeds, write_model
from test_dpo import ARGUMENTS, dpo_options, go_back, make_reference, metrics_of
from test_plan import write_geometry

from conj import InputError
from conj.data.files import read_jsonl
from conj.data.manifest import read_manifest
from conj.data.packs import plan_packs, plan_steps
from conj.data.tokens import TokenizedPairs
from conj.model import backends
from conj.train import dpo, fit, sharding
from conj.train.advice import Machine, count_step, largest_pack
from conj.train.fit import (
    check_idle,
    check_least,
    check_reference_fits,
    choose_options,
    describe_training,
    of_pack,
    packer,
    settle_options,
)  # fmt: skip
from conj.train.memory import GIB
from conj.train.options import DPOOptions, ReferenceOptions, check_machine

CONFIG = config_of(QWEN2["7B"], 28)


def long_pairs(num_prompts: int = 60, prompt: int = 1500, judgment: int = 250, each: int = 4) -> TokenizedPairs:
    number = num_prompts * each
    ids = array("i", [1])
    return TokenizedPairs(
        ids=["p"] * number, is_eval=[False] * number, prompts=[ids * prompt] * num_prompts,
        prompt_of=[i // each for i in range(number)], judgments=[(ids * judgment,) * 2] * number,
    )  # fmt: skip


def gpus(number: int, gib: float) -> Machine:
    return Machine(num_ranks=number, num_local=min(number, 8), num_shards=number, gpu_bytes=int(gib * GIB))


def chosen(machine: Machine, pairs: TokenizedPairs | None = None, **given) -> DPOOptions:
    pairs = pairs or long_pairs()
    options = DPOOptions(run_dir="r", model="m", **given)
    members = plan_steps(
        pairs, list(range(len(pairs))), pairs_per_step=options.pairs_per_step, share="prompt", seed="0"
    )
    pack = packer(pairs, members)
    found = choose_options(options, pairs, members, CONFIG, machine, pack)
    if machine.gpu_bytes:  # whatever is chosen fits
        shape, num_turns = largest_pack(pairs, pack(found), CONFIG, machine.num_ranks)
        assert count_step(found, CONFIG, shape, num_turns, machine).total <= machine.usable
    return found


def test_on_a_cpu_the_defaults_are_what_they_were():
    found = chosen(Machine(num_ranks=1, num_local=1, num_shards=1))
    assert (found.activation_checkpointing, found.max_tokens_per_pack, found.pack_multiple) == ("none", 16384, 1)
    assert chosen(Machine(num_ranks=4, num_local=4, num_shards=4)).pack_multiple == 4


def test_little_memory_takes_recomputation_before_smaller_packs():
    """8 cards of 80 GB keep all, also the gathered weights; a pack is smaller than a prompt with its pairs only where even full recomputation wants it."""
    many = {"pairs_per_step": 192}  # 24 packs of 5,500 tokens or fewer of 16,000
    assert chosen(gpus(8, 79)).activation_checkpointing == "none"
    assert not chosen(gpus(8, 79)).reshard_after_forward  # room for the gathered weights too
    hows = [chosen(gpus(8, gib), max_tokens_per_pack=16384, **many).activation_checkpointing for gib in (120, 66, 40)]
    assert hows == ["none", "selective", "full"]
    assert [chosen(gpus(1, gib)).activation_checkpointing for gib in (139, 130)] == ["none", "full"]
    assert chosen(gpus(1, 139)).max_tokens_per_pack >= 1500 + 4 * 2 * 249  # not below a prompt with its pairs
    assert chosen(gpus(8, 24), **many).max_tokens_per_pack < 16384


def test_the_packs_of_all_steps_are_planned_once(tied_model, monkeypatch, tmp_path):
    """To choose options, to look for idle ranks, and to train: they take seconds where there are many pairs."""
    pairs, asked = long_pairs(), []
    members = plan_steps(pairs, list(range(len(pairs))), pairs_per_step=24, share="prompt", seed="0")
    monkeypatch.setattr(fit, "plan_packs", lambda *given, **how: asked.append(how) or plan_packs(*given, **how))
    for name in ("pairs.jsonl", "reference.safetensors"):
        (tmp_path / name).touch()
    options, pack = DPOOptions(run_dir=tmp_path, model=tied_model), packer(pairs, members)
    found = settle_options(options, False, pairs, members, gpus(8, 79), pack)
    assert len(pack(found)) == len(members) == len(asked)


def test_what_is_given_is_kept():
    found = chosen(gpus(8, 140), activation_checkpointing="full", max_tokens_per_pack=5000, pack_multiple=16)
    assert (found.activation_checkpointing, found.max_tokens_per_pack, found.pack_multiple) == ("full", 5000, 16)
    assert chosen(gpus(8, 140), reshard_after_forward=True).reshard_after_forward is True


@pytest.mark.parametrize(
    ("machine", "given", "parts"),
    [
        (gpus(1, 79), {}, ("stage 6", "on a GPU of 79.0", "weights and moments 85.1", "--cpu-offload takes")),
        (
            gpus(8, 60), {"activation_checkpointing": "none", "max_tokens_per_pack": 16384, "pairs_per_step": 192},
            ("--activation-checkpointing selective takes", "--max-tokens-per-pack"),
        ),
        (gpus(8, 64), {"audit_mode": True, "pairs_per_step": 768}, ("stage 6", "--no-audit-mode takes")),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_what_would(machine, given, parts):
    """Each option of the line is one with which the same run is not refused."""
    with pytest.raises(InputError) as raised:
        chosen(machine, long_pairs(400), **given)
    assert all(part in str(raised.value) for part in parts), raised.value
    assert "\n" not in str(raised.value)
    first = str(raised.value).split("); ")[1].split(" takes ")[0].split()
    changes = {}
    for flag, value in zip(first, [*first[1:], ""]):
        if flag.startswith("--"):
            name = flag.removeprefix("--").removeprefix("no-").replace("-", "_")
            changes[name] = (not flag.startswith("--no-")) if value.startswith("--") or not value else value
    chosen(machine, long_pairs(400), **given | {k: int(v) if str(v).isdigit() else v for k, v in changes.items()})


def test_ranks_without_work_are_refused_with_the_option_that_gives_them_some():
    pairs = long_pairs()
    members = plan_steps(pairs, list(range(len(pairs))), pairs_per_step=24, share="prompt", seed="0")
    for given, num_ranks, better in (
        ({"pack_multiple": 1}, 16, "--pack-multiple 16"), ({"pack_multiple": 64}, 64, "--pairs-per-step of 64"),
    ):  # fmt: skip
        options = DPOOptions(run_dir="r", model="m", max_tokens_per_pack=16384, **given)
        steps = [plan_packs(pairs, step, **of_pack(options)) for step in members]
        with pytest.raises(InputError, match=better):
            check_idle(options, steps, num_ranks)
        check_idle(options, steps, 2)


def test_stage_5_and_any_stage_at_all_are_refused_where_no_pack_fits():
    pairs, options = long_pairs(), ReferenceOptions(run_dir="r", model="m")
    packs = plan_packs(pairs, range(len(pairs)), max_tokens=16384, share="prompt")
    with pytest.raises(InputError, match="stage 5: .* more GPUs would fit"):
        check_reference_fits(options, pairs, packs, CONFIG, gpus(1, 24))
    with pytest.raises(InputError, match=r"--max-tokens-per-pack \d+ would fit"):
        check_reference_fits(options, pairs, packs, CONFIG, gpus(1, 32.5))
    check_reference_fits(options, pairs, packs, CONFIG, gpus(1, 40))


def test_conj_check_refuses_a_model_that_no_visible_gpu_holds(tmp_path):
    """Whatever the pairs will be."""
    model = write_model(tmp_path / "model")
    for stage, options in (
        ("dpo", DPOOptions(run_dir="r", model=model)),
        ("reference", ReferenceOptions(run_dir="r", model=model)),
    ):
        with pytest.raises(InputError, match="GPU of"):
            check_least(stage, options, gpus(1, 1))
        check_least(stage, options, gpus(1, 8))


def test_conj_check_counts_the_ranks_of_all_nodes(tmp_path, monkeypatch):
    """A model that 16 ranks of two nodes hold together, and 8 of one do not."""
    monkeypatch.setattr(backends, "this_machine", lambda device: backends.Machine(num_gpus=8, capability=(9, 0)))
    size = types.SimpleNamespace(total_memory=16 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: size)
    options = DPOOptions(run_dir="r", model=write_geometry(tmp_path / "model"), attention="sdpa", dp_shard_size=16)
    check_machine([("dpo", options)], 8, 16)
    with pytest.raises(InputError, match=r"\[dpo\] stage 6: expected at most"):
        check_machine([("dpo", dataclasses.replace(options, dp_shard_size=8))], 8, 16)


def test_the_text_of_a_plan_says_memory_and_ranks():
    pairs = long_pairs()
    options = chosen(gpus(8, 79), pairs)
    members = plan_steps(pairs, list(range(len(pairs))), pairs_per_step=24, share="prompt", seed="0")
    text = describe_training(
        options, pairs, [plan_packs(pairs, s, **of_pack(options)) for s in members], gpus(8, 79), config=CONFIG
    )
    for part in (
        "10 steps of 24 pairs, 8.0 packs",
        "8 ranks, 0%",
        "--pack-multiple 8",
        "of 72.8 GiB",
        "by count",
        "disk 289.4 GB",
    ):
        assert part in text, text


# ---- In a run ----


@pytest.fixture
def ready(run_folder, tied_model):
    make_reference(run_folder, tied_model)
    return run_folder


def recorded(run) -> dict:
    options = read_manifest(run / "model")["options"]
    return {name: options[name] for name in ("activation_checkpointing", "max_tokens_per_pack", "pack_multiple")}


def test_what_was_chosen_stays_when_the_run_goes_on(ready, tied_model):
    """Begun for 2 ranks, in mid-run alone: the packs are those of 2, and so is every loss."""
    dpo.main(dpo_options(ready, tied_model, pack_multiple=2, max_tokens_per_pack=16384, save_every=2, max_steps=4))
    expected = metrics_of(ready)
    go_back(ready, 2)
    dpo.main(dpo_options(ready, tied_model, max_tokens_per_pack=None, save_every=2, max_steps=4))
    assert recorded(ready) == {"activation_checkpointing": "none", "max_tokens_per_pack": 16384, "pack_multiple": 2}
    assert metrics_of(ready) == expected
    dpo.main(
        dpo_options(ready, tied_model, max_tokens_per_pack=None, save_every=2, max_steps=4)
    )  # complete: nothing to do
    with pytest.raises(InputError, match="pack_multiple=2, now 4"):
        dpo.main(dpo_options(ready, tied_model, pack_multiple=4, max_tokens_per_pack=None, save_every=2, max_steps=4))


def test_another_value_than_a_run_began_with_is_refused_and_leaves_it_as_it_is(ready, tied_model):
    """It once went into the manifest, and then the line that the run began with did not fit its checkpoints any more."""
    given = {"max_tokens_per_pack": None, "save_every": 2, "max_steps": 4}
    dpo.main(dpo_options(ready, tied_model, **given))
    expected = metrics_of(ready)
    go_back(ready, 2)
    with pytest.raises(InputError, match="expected --pack-multiple 1, with which it began, or none, found 4"):
        dpo.main(dpo_options(ready, tied_model, pack_multiple=4, **given))
    dpo.main(dpo_options(ready, tied_model, **given))
    assert metrics_of(ready) == expected


def test_what_was_taken_from_another_run_settles_nothing_for_other_options(ready, tied_model, tmp_path):
    """Nor is what is complete there refused for ranks that would be idle here."""
    shutil.copytree(ready, tmp_path / "other")  # before it has a model
    dpo.main(dpo_options(ready, tied_model, pack_multiple=2, max_tokens_per_pack=16384, max_steps=2, pairs_per_step=24))
    given = {"from_runs": (ready,), "max_tokens_per_pack": None, "max_steps": 2, "pairs_per_step": 24}
    options, eight = (
        dpo_options(tmp_path / "other", tied_model, **given),
        Machine(num_ranks=8, num_local=8, num_shards=8),
    )
    pairs, members = long_pairs(), [[0]]
    assert settle_options(options, False, pairs, members, eight, packer(pairs, members)).pack_multiple == 2
    dpo.main(options)
    alone = dataclasses.replace(options, from_runs=())  # by its own manifest
    assert settle_options(alone, False, pairs, members, eight, packer(pairs, members)).pack_multiple == 2
    members = plan_steps(pairs, list(range(len(pairs))), pairs_per_step=24, share="prompt", seed="0")
    other = dataclasses.replace(alone, learning_rate=1e-4)
    assert settle_options(other, False, pairs, members, eight, packer(pairs, members)).pack_multiple == 8


def test_a_run_takes_the_model_of_another_that_was_begun_on_more_ranks(ready, tied_model, tmp_path):
    """`--from`, with automatic options: nothing is trained again."""
    dpo.main(dpo_options(ready, tied_model, pack_multiple=2, max_tokens_per_pack=16384, max_steps=2))
    (tmp_path / "other").mkdir()
    dpo.main(dpo_options(tmp_path / "other", tied_model, from_runs=(ready,), max_tokens_per_pack=None, max_steps=2))
    assert (
        read_manifest(tmp_path / "other" / "model")["taken_from"] and recorded(tmp_path / "other")["pack_multiple"] == 2
    )


def test_out_of_memory_names_what_was_asked_for_and_options_that_would_fit(ready, tied_model, monkeypatch, capsys):
    """The count said that it fits; the line names what takes less than was counted, on any rank."""
    said = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1 GiB is free. More."

    def fails(*_):
        raise torch.OutOfMemoryError(said)

    monkeypatch.setattr(dpo, "train_step", fails)
    monkeypatch.setattr(sharding.World, "machine", lambda self: gpus(1, 79))
    with pytest.raises(SystemExit, match=r"rank 0: failed: CUDA out of memory\. Tried to allocate 2\.00 GiB.*by count; "
                       r".*--activation-checkpointing (selective|full) takes") as raised:  # fmt: skip
        dpo.main(dpo_options(ready, tied_model, max_tokens_per_pack=2000, activation_checkpointing="none"))
    assert "\n" not in str(raised.value)


@pytest.mark.slow
def test_eight_ranks_with_defaults_have_no_turn_without_a_pack(ready, tied_model):
    """`torchrun --nproc_per_node 8 -m conj.train.dpo`; and one rank, told the same packs, has the same losses to 1e-4."""
    succeeds("conj.train.dpo", "--run-dir", ready, "--model", tied_model, *ARGUMENTS, "--max-steps", "3", ranks=8)
    assert recorded(ready)["pack_multiple"] == 8
    losses = [row["loss"] for row in read_jsonl(ready / "metrics.jsonl")]
    go_back(ready, 0)
    dpo.main(dpo_options(ready, tied_model, max_steps=3, max_tokens_per_pack=None))
    assert [row["loss"] for row in read_jsonl(ready / "metrics.jsonl")] == pytest.approx(losses, abs=1e-4)


@pytest.mark.slow
def test_most_ranks_idle_is_refused_at_the_first_start(ready, tied_model):
    line = ("conj.train.dpo", "--run-dir", ready, "--model", tied_model, "--dtype", "float32", "--pack-multiple", "1")
    [said] = [x for x in command(*line, ranks=4).stderr.splitlines() if x.startswith("error: ")]
    assert "without a pack" in said and "--pack-multiple 4" in said
