"""Small tokenizers with chat templates built like those of the model families, in our own words: what counts here is what
they draw, what they refuse and where a turn ends."""

from pathlib import Path

from conftest import CHATML, write_tokenizer
from tokenizers import AddedToken

TERMS = ["环丙沙星滴眼液", "naïve", "<|im_end|>x", "x<|im_end|>"]  # a user's own words; two try to hide a control token
THINK = [AddedToken(name, normalized=False) for name in ("<think>", "</think>", "<tool_call>", "</tool_call>")]

# Thoughts of past turns are taken out, and the last answer gets an empty one; the prompt itself opens none.
QWEN3 = """
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
    {%- set text = m.content %}
    {%- if m.role == 'assistant' %}
        {%- set thought = text.split('</think>')[0].split('<think>')[-1].strip('\n') if '</think>' in text else '' %}
        {%- set text = text.split('</think>')[-1].lstrip('\n') %}
        {%- if loop.index0 > ns.last %}{%- set text = '<think>\n' + thought + '\n</think>\n\n' + text %}{%- endif %}
    {%- endif %}
    {{- '<|im_start|>' + m.role + '\n' + text + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}
"""
# A system turn is always there, and says the date; texts are trimmed.
LLAMA3 = """
{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = DATE %}{%- endif %}
{%- set system = '' %}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content | trim %}{%- set messages = messages[1:] %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\nToday is ' + date_string + '\n\n' + system + '<|eot_id|>' }}
{%- for m in messages %}
    {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}
"""
LLAMA31 = LLAMA3.replace("DATE", "'26 Jul 2024'")
LLAMA32 = LLAMA3.replace("DATE", "strftime_now('%d %b %Y')")
# Turns of user and assistant and no others; their marks are text.
MISTRAL1 = """
{{- bos_token }}
{%- for m in messages %}
    {%- if m.role != ['user', 'assistant'][loop.index0 % 2] %}{{- raise_exception('expected user and assistant') }}{%- endif %}
    {{- ' [INST] ' + m.content + ' [/INST]' if m.role == 'user' else ' ' + m.content + eos_token }}
{%- endfor %}
"""
# The system's text stands before the last user's; the marks are tokens.
MISTRAL3 = """
{{- bos_token }}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content + '\n\n' %}{%- set messages = messages[1:] %}
{%- endif %}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {{- '[INST] ' + (system if loop.last and system is defined else '') + m.content + '[/INST]' }}
    {%- else %}{{- ' ' + m.content | trim + eos_token }}
    {%- endif %}
{%- endfor %}
"""
# The marks of the turns are not called special, nor is the <think> that the prompt ends with.
R1 = """
{{- bos_token }}
{%- for m in messages %}{%- if m.role == 'system' %}{{- m.content }}{%- endif %}{%- endfor %}
{%- for m in messages %}
    {%- if m.role == 'user' %}{{- '<｜User｜>' + m.content }}
    {%- elif m.role == 'assistant' %}{{- '<｜Assistant｜>' + m.content.split('</think>')[-1] + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<｜Assistant｜><think>\n' }}{%- endif %}
"""
HEADERS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
LLAMA = {"special": HEADERS, "bos_token": HEADERS[0], "eos_token": "<|eot_id|>"}
MISTRAL = {"bos_token": "<s>", "eos_token": "</s>"}
STYLES = {
    "chatml": {"chat_template": CHATML, "eos_token": "<|endoftext|>", "words": [*TERMS, *THINK[2:]]},  # as Qwen2.5's base
    "qwen3": {"chat_template": QWEN3, "words": [*TERMS, *THINK]},
    "llama 3.1": LLAMA | {"chat_template": LLAMA31, "words": ["环丙沙星滴眼液", "<|eot_id|><|eot_id|>"]},
    "llama 3.2": LLAMA | {"chat_template": LLAMA32, "eos_token": "<|end_of_text|>", "words": ["环丙沙星滴眼液"]},
    "mistral 0.1": MISTRAL | {"chat_template": MISTRAL1, "special": ["<unk>", "<s>", "</s>"], "words": ["环丙沙星滴眼液"]},
    "mistral 0.3": MISTRAL
    | {"chat_template": MISTRAL3, "special": ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"], "words": ["[IMG]", "naïve"]},
    "r1": {"chat_template": R1, "special": ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"]}
    | {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"}
    | {"words": ["<｜User｜>", "<｜Assistant｜>", *THINK, "环丙沙星滴眼液"]},
}  # fmt: skip


def write_style(folder: Path, style: str, **changes) -> Path:
    """A tokenizer folder in that style, as `transformers` reads it without rules of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder, **STYLES[style] | {"tokenizer_class": "PreTrainedTokenizerFast"} | changes)
    return folder


def official(folder: Path):
    """The tokenizer of `transformers`."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def filled_first(folder: Path, messages: list[dict], **settings) -> list[int]:
    """The official ids: the template is filled, then encoded."""
    reference = official(folder)
    text = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **settings)
    return reference(text, add_special_tokens=False).input_ids
