"""Flips one byte at a time in a copy of a finished run and asks the audit what is broken.

    python scripts/tamper.py --run-dir runs/demo --json out.json

Every artefact, every manifest, what stages made beside them, checkpoints, and the base model: in each a byte at a place
drawn by the seed; a model's card, which decides nothing, aside. Prints a table, and exits with 1 if a change was not found or another link was named than the one
that holds the byte.
"""

import random
import shutil
import sys
import tempfile
from pathlib import Path

from bench_common import argument_parser, write_rows

from conj.data.card import CARD
from conj.data.identity import hash_files
from conj.data.manifest import list_artefacts, manifest_path, read_manifest
from conj.data.model_files import deciding_files
from conj.data.tokens import TOKENS
from conj.train.audit.chain import check_card, check_chain


def places(run: Path, base: Path) -> list[tuple[Path, str]]:
    """Files to change, each with the link that the audit must name."""
    found = []
    for artefact in list_artefacts(run):
        found.append((manifest_path(artefact), artefact.name))
        files = [artefact / name for name in hash_files(artefact)] if artefact.is_dir() else [artefact]
        files += [run / name for name in read_manifest(artefact).get("also", {}) if (run / name).is_file()]
        found += [(path, artefact.name) for path in files if path.stat().st_size]
    found += [(path, TOKENS) for path in run.glob(TOKENS)]
    found += [(path, "model") for path in sorted((run / "tensorboard").iterdir())]
    found += [(path, f"checkpoints/{path.parent.name}") for path in sorted(run.glob("checkpoints/*/rank-*"))]
    found.append((run / CARD, CARD))
    found += [(path, "repeated.jsonl") for path in deciding_files(base)]  # the first stage that read it
    return found


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--run-dir", type=Path, required=True, help="finished run folder; it is not changed")
    parser.add_argument("--base", type=Path, default=Path("demo/base"), help="its base model")
    parser.add_argument("--seed", type=int, default=0, help="seed of the places")
    parser.add_argument("--json", type=Path, help="file for the rows")
    args = parser.parse_args()
    rng, rows = random.Random(args.seed), []
    with tempfile.TemporaryDirectory() as folder:
        run = Path(shutil.copytree(args.run_dir, Path(folder) / args.run_dir.name))
        base = Path(shutil.copytree(args.base, Path(folder) / "base"))
        assert all(check.outcome == "holds" for check in check_chain(run, base)), "the run as it stands does not hold"
        print("| changed | byte | first broken link | what the audit says |\n|---|---|---|---|")
        for path, link in places(run, base):
            whole = path.read_bytes()
            place = rng.randrange(len(whole))
            path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << rng.randrange(8))]) + whole[place + 1 :])
            broken = [c for c in (*check_chain(run, base), *check_card(run)) if c.outcome == "BROKEN"]
            path.write_bytes(whole)
            name, said = (broken[0].name, broken[0].found.replace(folder, "…")) if broken else ("none", "")
            rows.append({"changed": str(path.relative_to(folder)), "byte": place, "found": name, "named": name == link})
            print(f"| {rows[-1]['changed']} | {place} | {name} | {said[:110]} |", flush=True)
    print(f"\n{sum(row['named'] for row in rows)} of {len(rows)} found and named")
    write_rows(args.json, rows)
    sys.exit(not all(row["named"] for row in rows))


if __name__ == "__main__":
    main()
