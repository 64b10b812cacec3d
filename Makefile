# Everything a newcomer needs: `make demo` and `make test` set up .venv themselves, on a CPU or a GPU.
PYTHON ?= python3
PYTHON312 ?= python3.12
BIN := .venv/bin

.PHONY: setup demo test test-oldest check lint format clean

setup:  ## the environment in .venv, with the right builds of torch and vLLM; quick when it is up to date
	@PYTHON=$(PYTHON) bash scripts/setup.sh

demo: setup  ## all seven stages of Con-J on the shipped tiny judge
	$(BIN)/python -m conj run demo/demo.toml

test: setup  ## every test that needs no GPU
	$(BIN)/python -m pytest -m "not gpu and not slow"

test-oldest: .venv-oldest/done  ## those without vLLM, on Python 3.12 and the oldest versions that setup.py allows
	PYTHONPATH=$(CURDIR) .venv-oldest/bin/python -m pytest -m "not gpu and not slow and not vllm" $(TESTS)

.venv-oldest/done: setup.py  # 5 GB: on PyPI the oldest torch has a build for CUDA alone, which pins its triton
	$(PYTHON312) -m venv --clear .venv-oldest
	.venv-oldest/bin/python -m pip install -qq uv
	.venv-oldest/bin/uv pip install --python .venv-oldest/bin/python --resolution lowest-direct -r setup.py --extra dev
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: lint test

clean:
	rm -rf runs/demo
