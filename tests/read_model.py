"""A model folder as a user's transformers reads it, any version from 4.51 on: run by tests in an environment of its own.

    python tests/read_model.py FOLDER PROMPTS.json MAX_NEW_TOKENS OUT.json

PROMPTS.json: a list of conversations. OUT.json: version, dtype, logits of fixed ids (the last position), the conversations'
ids, and what is generated for each by the folder's own generation_config.json.
"""

import json
import sys

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, prompts, max_new_tokens, out = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype="auto").eval()
ids, texts = [], []
with torch.no_grad():
    logits = model(torch.arange(60)[None] * 7 + 3).logits[0, -1].tolist()
    for conversation in json.load(open(prompts, encoding="utf-8")):
        text = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
        ids.append(tokenizer(text, add_special_tokens=False)["input_ids"])
        written = model.generate(torch.tensor([ids[-1]]), max_new_tokens=int(max_new_tokens))[0, len(ids[-1]) :]
        texts.append(tokenizer.decode(written, skip_special_tokens=True))
found = {"version": transformers.__version__, "dtype": str(model.dtype), "logits": logits, "ids": ids, "texts": texts}
json.dump(found, open(out, "w", encoding="utf-8"))
