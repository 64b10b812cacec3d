"""The judge of a run: one for all stages from sampling to training, named by their manifests."""

from dataclasses import dataclass

from conj.data.judges import Judge, load_judge
from conj.data.manifest import RunOptions
from conj.data.options import option, require

JUDGE_HELP = "whose prompt, and how its judgments are written and read: a judge that conj ships, or a judge file"


@dataclass(frozen=True, kw_only=True)
class JudgedRunOptions(RunOptions):
    judge: str = option("con-j", help=JUDGE_HELP, affects_result=False)

    def read_judge(self) -> Judge:
        """Raises InputError for one that no model can be trained as."""
        judge = load_judge(self.judge)
        require(
            judge.backend == "vllm",
            f"--judge {self.judge}: is behind an endpoint, and cannot be trained; expected a judge without one, and --api-model "
            "for an endpoint that writes the judgments",
        )
        for name in ("chat_template", "max_length"):
            require(
                getattr(judge, name) is None,
                f"--judge {self.judge}: {name}: expected none in training, which takes that of the model folder",
            )
        return judge
