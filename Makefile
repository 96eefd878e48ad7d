# make demo   install, then the whole job on MovieLens-100K: prepare … report
# make test   install, then linter, type checker and tests
# make install / make clean
PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3.11)
VENV := .venv
RECIPE ?= quickstart
ARGS ?=
TESTS ?= tests

.PHONY: demo test install install-dev lint clean

demo: install
	$(VENV)/bin/tandem run $(RECIPE) $(ARGS)

test: install-dev lint
	$(VENV)/bin/python -m pytest -q $(TESTS)

lint: install-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

install:
	@$(PYTHON) -m launch.install

install-dev:
	@$(PYTHON) -m launch.install --dev

clean:
	rm -rf $(VENV) *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
