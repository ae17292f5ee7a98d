# Two commands do everything on a bare machine: `make demo` and `make test`.
.PHONY: setup demo test check
VARIANT ?= auto
BIN := .venv/bin

setup: ## fill .venv (once; again only when something changed)
	@scripts/setup.sh $(VARIANT)

demo: setup ## the whole loop on the built-in model and real text; ARGS=--json for one last JSON line
	@$(BIN)/learnd demo $(ARGS)

test: setup ## every test, also those of the whole daemon; ARGS="-k name" for some, ARGS="--ignore tests/end_to_end" for the quick ones
	@$(BIN)/python -m pytest --numprocesses 2 --no-loadscope-reorder --durations 15 $(ARGS) # one process for the daemons, one for all else

check: setup ## lint, types, architecture
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/python -m pytest tests/test_architecture.py tests/test_packaging.py
