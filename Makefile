# Everything a newcomer needs: `make demo` and `make test` set up .venv themselves, on a CPU or a GPU.
PYTHON ?= python3
PYTHON312 ?= python3.12
BIN := .venv/bin

.PHONY: setup demo real test test-oldest check lint format lock clean

setup:  ## the environment in .venv, with the right builds of torch and vLLM; quick when it is up to date
	@PYTHON=$(PYTHON) bash scripts/setup.sh

demo: setup  ## all seven stages of Con-J on the shipped tiny judge
	$(BIN)/python -m conj run demo/demo.toml

real: setup  ## the same on a real model and real answers: docs/real.md
	@test -d runs/real-base || $(BIN)/python scripts/make_real_base.py --out runs/real-base
	$(BIN)/python scripts/make_ladder.py --data real/ultrafeedback.jsonl.gz --out runs/real-data
	$(BIN)/python -m conj run real/real.toml

TWO_FILES = -n 2 --dist loadfile  # two processes, a file of tests each: most tests wait for processes of their own

test: setup  ## every test that needs no GPU
	$(BIN)/python -m pytest -m "not gpu and not slow" $(TWO_FILES)

test-oldest: .venv-oldest/done  ## those without vLLM, on Python 3.12 and the oldest versions that pyproject.toml allows
	PYTHONPATH=$(CURDIR) .venv-oldest/bin/python -m pytest -m "not gpu and not slow and not vllm" $(TWO_FILES) $(TESTS)

.venv-oldest/done: pyproject.toml  # 5 GB: on PyPI the oldest torch has a build for CUDA alone, which pins its triton
	$(PYTHON312) -m venv --clear .venv-oldest
	.venv-oldest/bin/python -m pip install -qq uv
	.venv-oldest/bin/uv pip install --python .venv-oldest/bin/python --resolution lowest-direct -r pyproject.toml --extra dev
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: lint test

# Both from PyPI alone (or UV_DEFAULT_INDEX), so that they say the same wherever they are made. Versions stay as they are
# unless that cannot be; LOCK=--upgrade takes the newest.
lock:  ## requirements/{cpu,gpu}.txt anew, from pyproject.toml and requirements/{cpu,gpu}.in
	@for device in cpu gpu; do \
	    if [ $$device = cpu ]; then without="--excludes requirements/left-out.txt"; else without=; fi; \
	    env -u UV_INDEX -u UV_FIND_LINKS $(BIN)/uv pip compile -q --universal --python-version 3.11 \
	        --fork-strategy fewest --annotation-style line --custom-compile-command "make lock" $(LOCK) \
	        pyproject.toml requirements/$$device.in --extra dev $$without -o requirements/$$device.txt || exit; \
	done
	@grep '^torch==' requirements/cpu.in >>requirements/cpu.txt
	@sed -i -E "$(MARKERS)" requirements/cpu.txt requirements/gpu.txt

# What every line would say: [tool.uv] environments, in pyproject.toml.
LINUX := and implementation_name.*'linux'
MARKERS := s/ (;|and) python_full_version < '3.14' $(LINUX)//; s/ $(LINUX)//

clean:
	rm -rf runs/demo
