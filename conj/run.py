"""The commands of conj."""

import importlib
from typing import NamedTuple


class Command(NamedTuple):
    module: str  # `python -m` runs it
    options: str  # its options, where torch is not imported for them: MODULE:CLASS

    def load_options(self) -> type:
        module, name = self.options.split(":")
        return getattr(importlib.import_module(module), name)


COMMANDS = {
    "preprocess": Command("conj.data.preprocess", "conj.data.preprocess:PreprocessOptions"),
    "repeated": Command("conj.sample.repeated", "conj.sample.repeated:RepeatedOptions"),
    "hinted": Command("conj.sample.hinted", "conj.sample.hinted:HintedOptions"),
    "pairs": Command("conj.data.pairs", "conj.data.pairs:PairsOptions"),
    "reference": Command("conj.train.reference", "conj.train.options:ReferenceOptions"),
    "dpo": Command("conj.train.dpo", "conj.train.options:DPOOptions"),
    "evaluate": Command("conj.sample.evaluation.evaluate", "conj.sample.evaluation.evaluate:EvaluateOptions"),
    "judge": Command("conj.sample.judge", "conj.sample.judge:JudgeOptions"),
    "attacks": Command("conj.sample.evaluation.attacks", "conj.sample.evaluation.attacks:AttackOptions"),
    "audit": Command("conj.train.audit", "conj.train.options:AuditOptions"),
}
