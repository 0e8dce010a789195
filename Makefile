# Every target makes its own environment: `make demo` and `make test` work on a fresh clone.
#   make test PYTHON=python3.12     another interpreter, in an environment of its own
#   make demo IMAGES=FOLDER         the demo on your own images
#   make demo FRESH=1               the demo from the start
PYTHON ?= python3
VENV := $(if $(filter python3,$(PYTHON)),.venv,.venv-$(notdir $(PYTHON)))
RUN := JAX_PLATFORMS=cpu $(VENV)/bin/python

.PHONY: demo test test-slow test-parity lint format clean
.DELETE_ON_ERROR:

demo: $(VENV)/.requirements
	$(VENV)/bin/python -m scripts.demo $(if $(IMAGES),--images="$(IMAGES)") $(if $(FRESH),--fresh)

test: $(VENV)/.requirements-test
	$(RUN) -m pytest -m "not slow and not parity"

test-slow: $(VENV)/.requirements-test
	$(RUN) -m pytest -m slow

test-parity: $(VENV)/.requirements-parity
	$(RUN) -m pytest -m parity

lint: $(VENV)/.requirements-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/.requirements-test
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf .venv .venv-* .pytest_cache .ruff_cache .mypy_cache .hypothesis

$(VENV)/.requirements-test $(VENV)/.requirements-parity: requirements.txt requirements-test.txt
$(VENV)/.requirements%: requirements%.txt $(VENV)/bin/python
	@echo "Installing $< into $(VENV) ..."
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: $(PYTHON) is older than Python 3.11; name another: make PYTHON=python3.12"; exit 2; }
	@echo "Making the environment $(VENV) with $$($(PYTHON) --version) ..."
	@$(PYTHON) -m venv $(VENV)
