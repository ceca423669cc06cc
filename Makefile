# `make run` sets up and serves; `make test` sets up and tests; `make check` is what CI runs.

PYTHON ?= python3
BIN := .venv/bin
WHAT ?= all
FILE ?=

.PHONY: run demo test check lint bench clean

run: .venv/runtime
	$(BIN)/python main.py

demo: .venv/runtime
	$(BIN)/python db_cli.py demo $(if $(FILE),--bookings $(FILE))

test: .venv/dev
	$(BIN)/python -m pytest -n auto

lint: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy .

check: lint test

bench: .venv/bench
	$(BIN)/python benchmarks/run.py $(WHAT)

.venv/runtime: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit("Holdfast needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/dev: .venv/runtime requirements-dev.txt requirements-parts.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@$(call each-of,requirements-parts.txt)
	@touch $@

.venv/bench: .venv/dev benchmarks/requirements.txt
	@$(call each-of,benchmarks/requirements.txt)
	@touch $@

# Install what can be installed here, and say what cannot.
define each-of
while read -r part; do case "$$part" in \#*|"") continue;; esac; \
  $(BIN)/python -m pip install --quiet --disable-pip-version-check "$$part" \
    || echo "left out: $$part cannot be installed here"; \
done < $(1)
endef

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
