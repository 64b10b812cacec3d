# Everything a newcomer needs: `make demo` and `make test` set up .venv themselves, on a CPU or a GPU.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test check lint format clean

setup:  ## the environment in .venv, with the right builds of torch and vLLM; quick when it is up to date
	@PYTHON=$(PYTHON) bash scripts/setup.sh

demo: setup  ## all seven stages of Con-J on the shipped tiny judge
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash scripts/demo.sh

test: setup  ## every test that needs no GPU
	$(BIN)/python -m pytest -m "not gpu and not slow"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: lint test

clean:
	rm -rf runs/demo
