"""Uploads a trained judge to the Hugging Face hub: the model folder and its card, in one commit.

    conj push --run-dir runs/mine --repo-id me/my-judge
    conj push --run-dir runs/mine --repo-id me/my-judge --private --revision beta-0.2

The model must be complete and unchanged since training. Its card is written for the hub: the snippets load the repository.
Who is logged in is asked of the hub's own client (`hf auth login`, or HF_TOKEN). Weights that the repository has and this
model has not are deleted in the same commit, so that nobody loads parts of two models.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from conj import InputError
from conj.data.card import owns_model, render_card
from conj.data.files import first_line
from conj.data.manifest import hash_input, locate, read_manifest
from conj.data.options import option, require, run_command


@dataclass(frozen=True, kw_only=True)
class PushOptions:
    run_dir: Path = option(help="run folder with a trained model")
    repo_id: str = option(help="repository on the hub, USER/NAME; it is made if it is not there")
    private: bool = option(False, help="make the repository private, if it is made")
    revision: str | None = option(None, help="branch to write to, made if it is not there; main if not given")


def push(options: PushOptions) -> None:
    """Uploads the model and prints where it is. Raises InputError for a run that is not complete, and for what the hub refuses."""
    folder, model = options.run_dir / "model", read_manifest(options.run_dir / "model")
    require(options.run_dir.is_dir(), f"{options.run_dir}: no such run folder")
    require(model is not None and model["complete"], f"{folder}: training is not complete; `conj dpo` makes it")
    there = locate(folder).parent
    require(owns_model(options.run_dir), f"{folder}: lies in another run; give --run-dir {there}")
    whole = hash_input(folder) == model["sha256"]
    require(whole, f"{folder}: was changed after training: its sha256 is not its manifest's")
    card = render_card(options.run_dir, name=options.repo_id, revision=options.revision)
    print(upload(folder, card, options))


def upload(folder: Path, card: str, options: PushOptions) -> str:
    """Makes the repository and the branch where they are missing, commits, and returns the address."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    with refusals_in_one_line(options.repo_id):
        api = HfApi(library_name="conj")
        repo = api.create_repo(options.repo_id, private=options.private or None, exist_ok=True)
        if options.revision:
            api.create_branch(repo.repo_id, branch=options.revision, exist_ok=True)
        files = {path.name: path for path in sorted(folder.iterdir()) if not path.name.startswith(".")}
        files["README.md"] = card.encode()
        stale = set(api.list_repo_files(repo.repo_id, revision=options.revision)) - files.keys()
        stale = sorted(name for name in stale if name.endswith((".safetensors", ".safetensors.index.json")))
        commit = api.create_commit(
            repo.repo_id, [*(CommitOperationAdd(name, content) for name, content in files.items()),
                           *(CommitOperationDelete(name) for name in stale)],
            commit_message="Judge trained by conj", revision=options.revision,
        )  # fmt: skip
    return f"{repo}: {commit.commit_url}"


@contextmanager
def refusals_in_one_line(repo_id: str) -> Iterator[None]:
    """What the hub and the way to it refuse, as an InputError."""
    # HTTPError: of the client that this version of huggingface_hub is written on.
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled

    try:
        yield
    except HFValidationError as e:
        raise InputError(f"--repo-id: expected USER/NAME, found {repo_id!r}: {first_line(e)}") from None
    except OfflineModeIsEnabled:
        raise InputError("the hub is switched off: HF_HUB_OFFLINE is set") from None
    except HfHubHTTPError as e:
        why = {
            401: "not logged in, or the token is not valid: `hf auth login`, or set HF_TOKEN",
            403: "no right to write there: the token needs write access to this name",
        }.get(e.response.status_code, f"the hub refused: {first_line(e)}")
        raise InputError(f"{repo_id}: {why}") from None
    except (
        HTTPError,
        OSError,
        ValueError,
    ) as e:  # no network, a server that answers otherwise, a card it does not take
        raise InputError(f"{repo_id}: the hub cannot be used: {first_line(e)}") from None


if __name__ == "__main__":
    run_command(push, PushOptions, __doc__)
