"""What the tests share: a small tokenizer and random models in Hugging Face folders, and runs with pairs."""

import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "2")

import pytest
import torch
from kill_common import num_lines  # noqa: F401  # for the tests
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from conj.data import judges
from conj.data.files import write_jsonl
from conj.model.backends import rounds_rows_alike

same_bits_in_any_pack = pytest.mark.skipif(
    not rounds_rows_alike(torch.device("cpu")), reason="on this CPU the number of rows decides a product's last bits"
)
ROOT = Path(__file__).parent.parent
DATA = ROOT / "tests" / "data"
SHARED = ROOT.parent / "shared" / "data"  # larger real data; tests that want it skip where it is absent
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}  # of processes that tests start
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
WORDS = [
    "the", "a", "of", "and", "red", "blue", "green", "one", "two", "three", "天空", "是", "蓝色", "的", "回答", "更好",
]  # fmt: skip
CARD = judges.load_judge("con-j")
INSTRUCTIONS = [text.partition("\n问题：{question}")[0] for text in (CARD.user, CARD.hint_1, CARD.hint_2)]
judge_messages = functools.partial(judges.judge_prompt, CARD)
judgment_text = functools.partial(judges.judgment_text, CARD)


def write_tokenizer(folder: Path, *, special: Sequence = CONTROL, words: Sequence = (), **changes) -> None:
    """A byte-level BPE tokenizer in Qwen2's form: no added tokens but the control tokens `special` and the vocabulary
    `words` (names, or AddedTokens). `changes` are to its tokenizer_config.json."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=560, initial_alphabet=alphabet, show_progress=False)
    corpus = [*INSTRUCTIONS, judgment_text(" ".join(WORDS), 1)] * 3
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens(list(special))
    tokenizer.add_tokens(list(words))
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"chat_template": CHATML, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    config |= {"tokenizer_class": "Qwen2Tokenizer", "model_max_length": 2048} | changes
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "original_max_position_embeddings": 64}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
DECODERS = {  # of every architecture and rope, and of every bias
    "qwen2": {},
    "qwen2, yarn": {"rope_parameters": YARN, "max_position_embeddings": 256},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "qwen3, yarn": {
        "model_type": "qwen3", "head_dim": 32, "max_position_embeddings": 1024,
        "rope_parameters": YARN | {"factor": 16.0, "beta_fast": 8.0, "beta_slow": 0.5},
    },
    "llama": {"model_type": "llama"},
    "llama, llama3": {"model_type": "llama", "rope_parameters": LLAMA3},
    "llama, biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral", "sliding_window": None, "head_dim": 24},
}  # fmt: skip


def write_model(folder: Path, *, tied: bool = True, max_shard_size: str = "1GB", **changes) -> Path:
    """A random decoder of 2 layers, saved by `transformers`: a Qwen2, or as `changes` to its config say."""
    torch.manual_seed(0)
    settings = dict(model_type="qwen2", vocab_size=600, hidden_size=64, intermediate_size=160, num_hidden_layers=2)
    settings |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048)
    settings |= dict(rope_parameters={"rope_type": "default", "rope_theta": 1e6}, tie_word_embeddings=tied) | changes
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings)).float()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tied_model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tied")


@pytest.fixture(scope="session")
def untied_model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "untied", tied=False)


def cpu_seconds(limit: float) -> float:
    """A limit of CPU time on a machine that is as busy as this one: more where a loop takes longer than the 0.13 s that it took
    where limits were set. Seen beside other processes: 1.16 s for what takes 0.74 s alone."""
    before = time.process_time()
    sum(i * i for i in range(2_000_000))
    return limit * max(1.0, (time.process_time() - before) / 0.13)


def open_thoughts(model: Path) -> None:
    """Changes a model's chat template to one whose prompts begin a thought."""
    opening = CHATML.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n")
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": opening}))


@pytest.fixture
def model_copy(tied_model, tmp_path) -> Path:
    """A model folder that a test may damage."""
    return Path(shutil.copytree(tied_model, tmp_path / "model"))


def random_pairs(num_prompts: int, seed: int = 0, max_pairs: int = 4) -> list[dict]:
    """Rows of pairs.jsonl: 1 to `max_pairs` pairs a prompt, judgments from empty to 20 words, a tenth held out."""
    rng = random.Random(seed)

    def words(most: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))

    rows = []
    for i in range(num_prompts):
        prompt = judge_messages(words(12), words(25), words(25))
        for j in range(rng.randint(1, max_pairs)):
            chosen, rejected = judgment_text(words(20), 1), "" if j == 3 else judgment_text(words(20), 2)
            rows.append(
                {"prompt": prompt, "chosen": [{"role": "assistant", "content": chosen}]}
                | {"rejected": [{"role": "assistant", "content": rejected}], "id": f"p{i:03}", "label": 1}
                | {"pair_type": "repeated", "split": "eval" if i % 10 == 9 else "train"}
            )
    return rows


def make_run(folder: Path, num_prompts: int = 5, answer: str = "an answer") -> Path:
    """A run folder with prompts.jsonl; the answers of each prompt are longer than those of the one before."""
    rows = [
        {"id": f"p{i}", "question": f"question {i}", "answer_1": answer * (i + 1), "answer_2": "another"}
        | {"label": 1 + i % 2, "source": "test", "subset": ""}
        for i in range(num_prompts)
    ]
    write_jsonl(folder / "prompts.jsonl", rows)
    return folder


@pytest.fixture
def run_folder(tmp_path) -> Path:
    """A run folder that holds pairs.jsonl of 30 prompts."""
    run = tmp_path / "run"
    write_jsonl(run / "pairs.jsonl", random_pairs(30))
    return run


def on_cpu(line: Sequence) -> list:
    """A module and its arguments; training stages say that they mean the CPU, also where a GPU is visible."""
    return [line[0], *(("--device", "cpu") if line[0].startswith("conj.train") else ()), *line[1:]]


def command(*arguments, ranks: int | None = None, **options) -> subprocess.CompletedProcess:
    """Runs `python -m ARGUMENTS`, or torchrun with `ranks` processes, as a user would."""
    launch = [] if ranks is None else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    line = [sys.executable, *launch, "-m", *map(str, on_cpu(arguments))]
    return subprocess.run(line, capture_output=True, text=True, env=ENV, cwd=ROOT, timeout=300, **options)


def succeeds(*arguments, **options) -> None:
    """A command that must end without an error."""
    done = command(*arguments, **options)
    assert done.returncode == 0, done.stderr


def run_script(name: str, *arguments) -> subprocess.CompletedProcess:
    """Runs a script as a user would, to its end without an error."""
    line = [sys.executable, ROOT / "scripts" / name, *arguments]
    done = subprocess.run(list(map(str, line)), capture_output=True, text=True, env=ENV, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


# Those that users have, with what each needs that the installed version does not fit.
VERSIONS = {"4.51.3": "tokenizers==0.21.4", "4.57.1": "tokenizers==0.22.1"}


@pytest.fixture(scope="session", params=VERSIONS)
def other_transformers(request, tmp_path_factory) -> Path:
    """A folder of packages that goes before the installed ones."""
    target = tmp_path_factory.mktemp("transformers")
    packages = [f"transformers=={request.param}", VERSIONS[request.param], "huggingface_hub<1"]
    line = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, *packages]
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"transformers {request.param} cannot be installed: {done.stderr[-200:]}")
    return target


def read_by(packages: Path | None, folder: Path, conversations: list, work: Path, max_new_tokens: int = 100) -> dict:
    """What `read_model.py` finds, by the transformers of `packages` or the installed one."""
    (work / "prompts.json").write_text(json.dumps(conversations))
    line = [
        sys.executable,
        ROOT / "tests" / "read_model.py",
        folder,
        work / "prompts.json",
        max_new_tokens,
        work / "out.json",
    ]
    env = {name: value for name, value in ENV.items() if name != "PYTHONPATH"}
    env |= {"PYTHONPATH": str(packages)} if packages else {}
    done = subprocess.run(list(map(str, line)), env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((work / "out.json").read_text("utf-8"))


def kill_when(line: list, ready_to_kill, seconds: float = 120) -> None:
    """Starts a command and kills it (SIGKILL) once `ready_to_kill()` holds."""
    process = subprocess.Popen([sys.executable, "-m", *map(str, on_cpu(line))], env=ENV, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + seconds
    while not ready_to_kill() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.poll() is None, "the command ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()


def assert_one_line_error(done: subprocess.CompletedProcess, *parts: str) -> None:
    """The contract on bad input: exit code 2, one line on stderr that names each of `parts`, no traceback."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    for part in parts:
        assert part in lines[0], lines[0]


def here(path: Path) -> Path:
    """Data that not every checkout has: skips where it is absent."""
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return path


def kernel_names() -> set[str]:
    """Of the Triton kernels of conj.model."""
    sources = "".join(path.read_text() for path in (ROOT / "conj" / "model").glob("*kernels.py"))
    return set(re.findall(r"@triton\.jit.*\ndef (\w+)", sources))


def change_config(folder: Path, **changes) -> None:
    """Changes a model folder's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
