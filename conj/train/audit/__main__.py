"""Can this run be trusted, and can it be repeated? Checks a run folder from the raw data to the exported weights.

    python -m conj.train.audit --run-dir runs/demo
    python -m conj.train.audit --run-dir runs/demo --replay 20 --reference
    python -m conj.train.audit --run-dir runs/demo --against runs/other

Always: every file is what its manifest says and was made from what stands before it, and the model's card says what they
say; then the reference's key, the exactness of step 0, the order of the data, and that the exported weights are the last
checkpoint's. `--replay` takes
steps again and compares, `--reference` has `transformers` compute a sample, `--against` finds where two runs part.
Prints a line a check, writes them to `audit.json` in the run folder and into the card, and exits with 1 if one does not hold. What cannot
be checked here (files that are elsewhere, another device) is listed as such and is no failure.
"""

import dataclasses
import functools
import json
import sys
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from conj import InputError
from conj.data.card import CARD, write_card
from conj.data.files import write_atomic
from conj.data.hub import find_model
from conj.data.manifest import locate, read_manifest, recorded_commit
from conj.data.options import run_command
from conj.train.audit.chain import Check, check_card, check_chain, recorded_base
from conj.train.audit.compare import compare_runs
from conj.train.audit.replay import replay
from conj.train.audit.second_opinion import second_opinion
from conj.train.audit.training import base_of, check_run, draw_pairs, read_run
from conj.train.options import AuditOptions
from conj.train.sharding import distributed, ending_process


def report(checks: list[Check], run: Path) -> bool:
    """Prints a line a check and writes `audit.json`. Returns whether nothing is broken."""
    broken = [check for check in checks if check.outcome == "BROKEN"]
    for check in checks:
        print(f"{check.outcome:9}  {check.name}: {check.found}")
    content = {"holds": not broken, "first_broken": broken[0].name if broken else None, "model": None}
    content["made"] = datetime.now(UTC).isoformat(timespec="seconds")
    with suppress(InputError):  # found by the check of the model
        content["model"] = (read_manifest(run / "model") or {}).get("sha256")  # that the result is of
    content["checks"] = [check._asdict() for check in checks]
    write_atomic(run / "audit.json", (json.dumps(content, ensure_ascii=False, indent=2) + "\n").encode())
    with suppress(InputError):  # a card that was edited is left as it is, for who looks into it
        if not any(check.name == CARD and check.outcome == "BROKEN" for check in checks):
            write_card(run)
    if broken:
        print(f"first broken link: {broken[0].name}: {broken[0].found}")
    return not broken


def main(options: AuditOptions) -> None:
    """The checks in the order of the chain; those that run the model come last, and only on a chain that holds."""
    with distributed(options.device) as world:
        if options.model is not None:
            recorded = functools.partial(recorded_commit, (options.run_dir,), is_model=True)
            options = dataclasses.replace(options, model=find_model(options.model, recorded))
        checks = world.on_main(lambda: check_chain(options.run_dir, options.model))
        holds = all(check.outcome == "holds" for check in checks)
        checks += world.on_main(lambda: check_card(options.run_dir))
        why = "the chain is broken" if not holds else "there is no trained model yet"
        is_trained = locate(options.run_dir / "model").exists()
        if holds and is_trained and not base_of(options).is_dir():
            base = recorded_base(options.run_dir)
            on_hub = f", or --model {base['repo']}@{base['revision']}" if "repo" in base else ""
            holds, why = False, f"the base model {base_of(options)} is not there; name its folder with --model{on_hub}"
        if holds and is_trained:
            try:
                run = read_run(options, world)
            except InputError as e:
                checks.append(Check("reference key", "BROKEN", str(e)))
            else:
                checks += check_run(run, options, world)
                if options.replay:
                    checks += replay(run, options.replay, world)
                if options.reference:
                    opinion = second_opinion(run.options, run.plan, draw_pairs(run, options), world)
                    checks += [Check(name, "holds" if holds else "BROKEN", found) for name, holds, found in opinion]
        else:
            checks.append(Check("training", "unchecked", why))
        if options.against:
            for name, same, found in world.on_main(lambda: list(compare_runs(options.run_dir, options.against))):
                checks.append(Check(f"against {options.against}: {name}", "holds" if same else "BROKEN", found))
        sound = world.on_main(lambda: report(checks, options.run_dir))
    if not sound:
        sys.exit(1)


if __name__ == "__main__":
    with ending_process():
        run_command(main, AuditOptions, __doc__)
