# `make run` sets up and serves; `make test` sets up and tests; `make check` is what CI runs.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
WHAT ?= all
FILE ?=
PART ?=
UPGRADE ?=
SBOM ?= sbom.json

# One lock for Linux and macOS on every Python from 3.11 on, with the hashes of all files.
LOCK := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --fork-strategy fewest \
  --generate-hashes --annotation-style line --custom-compile-command 'make lock' \
  $(if $(UPGRADE),--upgrade)

.PHONY: run demo test check lint bench lock part sbom audit clean

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

# After a change to a list of what we chose. What is locked stays, unless UPGRADE=1.
lock: .venv/dev
	$(LOCK) requirements.in -o requirements.txt
	$(LOCK) requirements-dev.in -o requirements-dev.txt
	$(LOCK) requirements-parts.in -o requirements-parts.txt

# What the running service is made of, as CycloneDX, from the lock alone.
sbom: .venv/dev
	$(BIN)/cyclonedx-py requirements requirements.txt --output-reproducible -o $(SBOM)

# Known weaknesses in what is locked.
audit: .venv/dev
	$(BIN)/python .ci/audit.py requirements.txt requirements-dev.txt requirements-parts.txt

.venv/runtime: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit("Holdfast needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) --require-hashes -r requirements.txt
	@touch $@

.venv/dev: .venv/runtime requirements-dev.txt requirements-parts.txt
	$(PIP) --require-hashes -r requirements-dev.txt
	@for part in $$(sed -n 's/^\([a-z0-9-]*\).*==.*/\1/p' requirements-parts.in); do \
	  $(MAKE) --no-print-directory part PART=$$part \
	    || echo "left out: $$part cannot be installed here"; \
	done
	@touch $@

# One of requirements-parts.in by itself: `make part PART=boto3`. Its hashes, and those of what it
# pulls in, come from the lock.
part: .venv/runtime
	@line=$$(grep -m 1 -E '^$(PART)(\[|==)' requirements-parts.in) || { \
	  echo "make part PART=NAME installs one of" $$(sed -n 's/^\([a-z0-9-]*\).*==.*/\1/p' requirements-parts.in) >&2; \
	  exit 2; }; \
	  { echo "$$line \\"; sed -n '/^$(PART)==/,/[^\\]$$/ { /--hash/p; }' requirements-parts.txt; } | \
	  $(PIP) --require-hashes -c requirements-parts.txt -r /dev/stdin

.venv/bench: .venv/dev benchmarks/requirements.txt
	@while read -r part; do case "$$part" in \#*|"") continue;; esac; \
	  $(PIP) "$$part" || echo "left out: $$part cannot be installed here"; \
	done < benchmarks/requirements.txt
	@touch $@

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis sbom.json
