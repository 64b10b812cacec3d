"""A Qwen2 of any size with random weights and a real tokenizer, to try the pipeline or time a step without a download.

    python scripts/make_random_model.py --tokenizer ../shared/data/qwen2-tokenizer --out /tmp/random-qwen2
    python scripts/make_random_model.py --tokenizer … --out … --hidden-size 3584 --intermediate-size 18944 --layers 28 \
        --heads 28 --kv-heads 4 --vocab-size 152064 --no-tie --dtype bfloat16        # the geometry of Qwen2-7B
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from bench_common import argument_parser
from transformers import AutoConfig, AutoModelForCausalLM

from conj.data.tokenizer import JudgeTokenizer
from conj.model.config import ARCHITECTURES
from conj.model.export import TOKENIZER_FILES


def write_random_model(
    out: Path,
    tokenizer_folder: Path,
    size: dict,  # as in bench_common.QWEN2
    *,
    dtype: str,
    max_position_embeddings: int = 32768,
    seed: int = 0,
    device: str = "cpu",
    architecture: str = "qwen2",
    rope: dict | None = None,
) -> None:
    """Writes a Hugging Face folder with the tokenizer of another one."""
    tokenizer = JudgeTokenizer.load(tokenizer_folder)
    config = AutoConfig.for_model(
        architecture, vocab_size=size["V"], hidden_size=size["D"], head_dim=size["D"] // size["N"],
        intermediate_size=size["F"], num_hidden_layers=size["L"], sliding_window=None,
        num_attention_heads=size["N"], num_key_value_heads=size["K"], max_position_embeddings=max_position_embeddings,
        rope_parameters=rope or {"rope_type": "default", "rope_theta": 1e6}, tie_word_embeddings=size["tie"],
        eos_token_id=tokenizer.special[tokenizer.turn_end], dtype=dtype,
    )  # fmt: skip
    torch.manual_seed(seed)
    torch.set_default_dtype(getattr(torch, dtype))
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(out)
    torch.set_default_dtype(torch.float32)
    for name in (*TOKENIZER_FILES, "tokenizer_config.json", "chat_template.jinja"):
        if (tokenizer_folder / name).exists():
            shutil.copyfile(tokenizer_folder / name, out / name)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with tokenizer.json and its config")
    parser.add_argument("--out", type=Path, required=True, help="model folder to write")
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="qwen2", help="model_type of its config")
    parser.add_argument("--rope", type=json.loads, help="rope_parameters of its config, JSON; theta 1e6 by default")
    parser.add_argument("--hidden-size", dest="D", type=int, default=128, help="width of the residual stream")
    parser.add_argument("--intermediate-size", dest="F", type=int, default=384, help="width of the mlp")
    parser.add_argument("--layers", dest="L", type=int, default=2, help="number of blocks")
    parser.add_argument("--heads", dest="N", type=int, default=4, help="number of query heads")
    parser.add_argument("--kv-heads", dest="K", type=int, default=2, help="number of key and value heads")
    parser.add_argument("--vocab-size", dest="V", type=int, default=151936, help="rows of the embedding")
    parser.add_argument("--max-position-embeddings", type=int, default=32768, help="context in tokens")
    parser.add_argument("--tie", action=argparse.BooleanOptionalAction, default=True, help="one matrix for both ends")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the stored weights")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights")
    args = vars(parser.parse_args())
    size = {name: args.pop(name) for name in ("D", "F", "L", "N", "K", "V", "tie")}
    out = args.pop("out")
    write_random_model(out, args.pop("tokenizer"), size, **args)
    print(f"{out}: {sum(f.stat().st_size for f in out.iterdir()) / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
