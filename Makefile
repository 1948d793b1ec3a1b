# Everything is installed into .venv; nothing but Python 3.11 or later and make has to be there.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check bench bench-check clean

demo: .venv/installed  ## Chatdify: web, worker, PostgreSQL, and a conversation of five messages
	$(BIN)/python -m example_app

test: .venv/installed  ## all tests, on the PostgreSQL at DATABASE_URL or localhost, else on an embedded one
	$(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

check: .venv/installed  ## style, layers and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/mypy

bench: .venv/bench-installed  ## everything against the six-line pattern and its peers; make bench ARGS='--only read --rounds 9'
	$(BIN)/python -m benchmarks.run $(ARGS)

bench-check: .venv/bench-installed  ## the same, failing when a bar is missed
	$(BIN)/python -m benchmarks.run --check $(ARGS)

clean:
	rm -rf .venv

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

.venv/bench-installed: .venv/installed
	$(BIN)/python -m pip install --quiet --editable '.[bench]'
	touch $@
