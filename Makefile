# Two commands do everything on a bare machine: `make demo` and `make test`.
.PHONY: setup demo test test-end-to-end check
VARIANT ?= auto
BIN := .venv/bin

setup: ## fill .venv (once; again only when something changed)
	@scripts/setup.sh $(VARIANT)

demo: setup ## the whole loop on the built-in model and real text; ARGS=--json for one last JSON line
	@$(BIN)/learnd demo $(ARGS)

test: setup ## every test but those of the whole daemon; ARGS="-k name" for some
	@$(BIN)/python -m pytest --durations 15 --ignore tests/end_to_end $(ARGS)

# Apart while the loop is being closed: these start the real daemon, and it has not been seen to pass them yet.
test-end-to-end: setup ## the whole daemon with the real engine
	@$(BIN)/python -m pytest -o faulthandler_timeout=3600 tests/end_to_end $(ARGS)

check: setup ## lint, types, architecture
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/python -m pytest tests/test_architecture.py tests/test_packaging.py
