# Everything here needs Python 3.11 or newer and pip, nothing else: a virtual environment is made in VENV on first use,
# and again when pyproject.toml changes.
PYTHON ?= python3
VENV ?= .venv
# Options for pytest, such as ARGS="-k decode -x".
ARGS ?=

python := $(VENV)/bin/python
pip_install := $(python) -m pip install --quiet --disable-pip-version-check --editable

.PHONY: help test lint demo clean

help:
	@echo "make test    all tests, on the CPU"
	@echo "make lint    formatting, lint and types"
	@echo "make demo    train a tiny model, draw its loss curve, decode on four simulated devices"
	@echo "make clean   delete builds and caches (not $(VENV), not runs/)"

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "mlra_jax needs Python 3.11 or newer; name one with make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "Making a virtual environment in $(VENV) and installing mlra_jax (0.7 GB, a minute or two) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(pip_install) .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "Installing what the tests and checks need (0.7 GB) ..."
	@$(pip_install) '.[dev]'
	@touch $@

test: $(VENV)/.installed-dev
	$(python) -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal $(ARGS)

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

demo: export JAX_PLATFORMS = cpu
demo: $(VENV)/.installed
	@echo "== Training configs/tiny.py (resumes where it stopped; nothing is left to do the second time)"
	$(python) train.py configs/tiny.py
	@echo "== Drawing its loss curve"
	$(VENV)/bin/mlra-plot runs/tiny --out runs/tiny/loss.png
	@echo "== Decoding, the KV cache split over four simulated devices"
	XLA_FLAGS=--xla_force_host_platform_device_count=4 \
	  $(python) decode.py --checkpoint runs/tiny --mesh.tensor 4 \
	  --prompt "ROMEO:" --temperature 0.7 --max-new-tokens 120

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
