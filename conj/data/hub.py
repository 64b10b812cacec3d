"""Names on the Hugging Face hub: what stands under a name at one commit, on this machine.

    ORG/NAME                                  a model or a data set, as its main branch has it
    ORG/NAME@REVISION                         as a branch, a tag or a commit has it
    ORG/NAME@REVISION:CONFIG/SPLIT            of a data set, each of the three left out or not

A path that exists wins. A model is downloaded into the hub's cache, of which only the files are fetched that conj reads:
no pickle, and no weights that no index names. The commit that a name led to stands in the manifests, and a run folder
keeps to it: its later stages and starts get the same, wherever the branch has moved. Of a download that broke off the
next start fetches the files that are missing, and without a network the cache is enough.
"""

import functools
import glob
import re
from collections.abc import Callable
from pathlib import Path

from conj import InputError
from conj.data.files import first_line
from conj.data.model_files import INDEX, JUDGE_FILE, LICENCE_FILES, MAX_INDEX_BYTES, SINGLE, TEXT_FILES, read_model_json

NAME = r"[\w-][\w.-]*"
REPO = re.compile(rf"((?:{NAME}/)?{NAME})(?:@([\w./-]+))?", re.ASCII)
COMMIT = re.compile("[0-9a-f]{40}")
SNAPSHOT = re.compile(r"models--(.+)/snapshots/([0-9a-f]{40})")  # the hub's cache, in it a model at a commit
BESIDE = ("README.md", *LICENCE_FILES, JUDGE_FILE)  # for who uses the folder; no weight or token depends on it

Recorded = Callable[[str], str | None]  # the commit of a repository that a run folder was made from


def split_repo(name: str | Path) -> tuple[str, str | None] | None:
    """Repository and revision of a name on the hub; None for what cannot be one."""
    found = REPO.fullmatch(str(name))
    return (found[1], found[2]) if found and ".." not in str(name) else None


def provenance(path: str | Path) -> dict[str, str]:
    """Repository and commit of a model folder in the hub's cache, or of a data set's name; nothing for others."""
    if isinstance(path, Path):
        found = SNAPSHOT.fullmatch("/".join(path.parts[-3:]))
        return {"repo": found[1].replace("--", "/", 1), "revision": found[2]} if found else {}
    repo, revision = split_repo(path) or ("", None)
    return {"repo": repo, "revision": revision} if revision and COMMIT.fullmatch(revision) else {}


def name_of(folder: Path) -> str:
    """How a model folder is named: its path, or in the hub's cache repository and commit, which lead to it everywhere."""
    if found := provenance(folder):
        from huggingface_hub.constants import HF_HUB_CACHE

        if Path(HF_HUB_CACHE).expanduser().resolve() in folder.resolve().parents:
            return f"{found['repo']}@{found['revision']}"
    return str(folder)


# ---- Models ----


def find_model(name: Path, recorded: Recorded = lambda repo: None) -> Path:
    """The folder of a model: a path that exists, or what a name on the hub leads to, downloaded unless it is there. Without
    a revision it is the commit that `recorded` knows, else the main branch's.

    Raises InputError for what is neither, and for what the hub does not give."""
    if name.exists():
        return name
    repo, revision = _repo_of(name)
    return download_model(repo, revision or recorded(repo))


def find_texts(name: Path) -> Path:
    """The folder of a model as `find_model` finds it; of one on the hub only the texts are fetched, no weights."""
    return name if name.exists() else _fetch(*_repo_of(name), TEXT_FILES)


def _repo_of(name: Path) -> tuple[str, str | None]:
    """A model's repository and revision. Raises InputError for what names none."""
    repo, revision = split_repo(name) or ("", None)
    if "/" not in repo:
        raise InputError(f"{name}: no such model folder")
    return repo, revision


@functools.cache
def download_model(repo: str, revision: str | None) -> Path:
    """A model's folder in the hub's cache: its texts, then the weights that its index names."""
    folder = _fetch(repo, revision, (*TEXT_FILES, INDEX, *BESIDE))
    weights = [SINGLE]
    if (folder / INDEX).exists():
        weight_map = read_model_json(folder / INDEX, MAX_INDEX_BYTES).get("weight_map")
        named = set(weight_map.values() if isinstance(weight_map, dict) else ())
        weights = sorted(glob.escape(name) for name in named if str(name).endswith(".safetensors"))
    if weights:
        _fetch(repo, folder.name, weights)
    if not any(folder.glob("*.safetensors")):
        raise InputError(f"{repo}: has no weights in safetensors, and a pickle is never fetched")
    return folder


def _fetch(repo: str, revision: str | None, patterns: tuple | list) -> Path:
    from huggingface_hub import snapshot_download  # here: those who name a path need not wait for it

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns)))
    except Exception as e:  # the client's, those of its HTTP library, and the disk's share no base class
        raise _refusal(e, repo, revision, "model") from None


# ---- Data sets ----


@functools.cache
def find_commit(repo: str, revision: str | None) -> str:
    """The commit of a data set's branch or tag: the hub's, or without a network what the cache last saw."""
    if revision and COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_CACHE

    try:
        return HfApi().dataset_info(repo, revision=revision).sha
    except Exception as e:
        refusal, known = _refusal(e, repo, revision, "dataset"), _is_unreachable(e)
    seen = Path(HF_HUB_CACHE, f"datasets--{repo.replace('/', '--')}", "refs", revision or "main")
    if known and seen.is_file() and COMMIT.fullmatch(commit := seen.read_text().strip()):
        return commit
    raise refusal


# ---- What the hub does not give ----


def _is_unreachable(error: Exception) -> bool:
    """Whether no answer came at all."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return bool(kinds & {"OfflineModeIsEnabled", "ConnectError", "TimeoutException", "ConnectionError"})


def _refusal(error: Exception, repo: str, revision: str | None, kind: str) -> InputError:
    """One line on why a repository is not here, and what helps."""
    from huggingface_hub import errors
    from huggingface_hub.constants import ENDPOINT, HF_HUB_CACHE, HF_HUB_OFFLINE

    name = f"{repo}@{revision}" if revision else repo
    what, place = ("model", "folder") if kind == "model" else ("data set", "file or folder")
    page = f"{ENDPOINT}/{'' if kind == 'model' else 'datasets/'}{repo}"
    get = f"`hf download {repo}{f' --revision {revision}' if revision else ''}{'' if kind == 'model' else ' --repo-type dataset'}`"
    if isinstance(error, errors.HFValidationError):
        return InputError(f"{name}: no such {place} here, and no name on the hub: {first_line(error)}")
    if isinstance(error, errors.GatedRepoError):
        return InputError(f"{name}: is gated; accept its terms at {page} and log in by `hf auth login`")
    if isinstance(error, errors.RepositoryNotFoundError):
        return InputError(
            f"{name}: no such {place} here, and no such {what} on the hub, or a private one: `hf auth login` shows those"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return InputError(
            f"{name}: the {what} has no such revision; expected a branch, a tag or a whole commit of {page}"
        )
    if isinstance(error, errors.LocalEntryNotFoundError) or _is_unreachable(error):
        why = "HF_HUB_OFFLINE is set" if HF_HUB_OFFLINE else "the hub cannot be reached"
        return InputError(
            f"{name}: no such {place} here, not whole in the cache ({HF_HUB_CACHE}), and {why}; get it by {get} where "
            "there is a network"
        )
    return InputError(f"{name}: the download broke off: {first_line(error)}; whole files stay: start again to go on")
