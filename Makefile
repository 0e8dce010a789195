# Every target makes its own environment: `make demo` and `make test` work on a fresh clone.
#   make test PYTHON=python3.12     another interpreter, in an environment of its own
#   make demo IMAGES=FOLDER         the demo on your own images
#   make demo FRESH=1               the demo from the start
PYTHON ?= python3
VENV := $(if $(filter python3,$(PYTHON)),.venv,.venv-$(notdir $(PYTHON)))
RUN := JAX_PLATFORMS=cpu $(VENV)/bin/python
# Where there is no TPU, libtpu (which the tests compile with) would complain at every start.
NO_TPU := $(if $(wildcard /dev/accel* /dev/vfio/*),,TPU_SKIP_MDS_QUERY=1 TPU_WORKER_HOSTNAMES=localhost TPU_ACCELERATOR_TYPE=v5litepod-1)

# One more than there are cores: tests of whole commands wait for a part of their time.
WORKERS ?= $(shell echo $$(( $$(getconf _NPROCESSORS_ONLN) < 7 ? $$(getconf _NPROCESSORS_ONLN) + 1 : 8 )))

.PHONY: demo test test-slow test-parity test-browser test-compat compat lint format clean broken
.DELETE_ON_ERROR:

demo: $(VENV)/lvm.done
	$(NO_TPU) $(VENV)/bin/python -m scripts.demo $(if $(IMAGES),--images="$(IMAGES)") $(if $(filter 1 true yes,$(FRESH)),--fresh)

test: $(VENV)/test.done
	$(RUN) -m pytest -m "not slow and not parity" -n $(WORKERS) --dist=worksteal

test-slow: $(VENV)/test.done
	@status=0; \
	$(RUN) -m pytest -m "(slow and not alone) or (hypothesis and not parity)" --hypothesis-profile=random -n $(WORKERS) --dist=worksteal || status=1; \
	$(RUN) -m pytest -m alone || status=1; \
	exit $$status
	$(MAKE) test-compat

test-parity: $(VENV)/parity.done
	$(RUN) -m pytest -m parity

# What is exported, in the transformers that many still have, 4.x: it can't be installed beside the other.
test-compat:
	$(MAKE) compat VENV=$(VENV)-compat

compat: $(VENV)/compat.done
	$(RUN) -m pytest -m parity tests/lvm/test_convert_parity.py

test-browser: $(VENV)/browser.done
	$(RUN) -m pytest -m browser

lint: $(VENV)/test.done
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

format: $(VENV)/test.done
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf .venv .venv-* .pytest_cache .ruff_cache .mypy_cache .hypothesis

# The project in editable mode, alone or with an extra of pyproject.toml.
$(VENV)/%.done: pyproject.toml requirements.txt $(VENV)/python.done
	@echo "Installing $(if $(filter lvm,$*),lvm,lvm[$*]) into $(VENV) ..."
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable ".$(if $(filter lvm,$*),,[$*])"
	@touch $@

# An environment that was half made, or whose Python is gone, is made anew.
$(VENV)/python.done: $(if $(shell $(VENV)/bin/python -m pip --version 2>/dev/null),,broken)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: $(PYTHON) is not Python 3.11 or later; name another: make PYTHON=python3.12"; exit 2; }
	@echo "Making the environment $(VENV) with $$($(PYTHON) --version) ..."
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV)
	@touch $@
