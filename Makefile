# make demo   set up and run the main job on synthetic rooms; ends by printing where the HTML report lies
# make test   set up and pass the tests
PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.PHONY: help install demo test lint minkowski clean

help:
	@sed -n 's/^# //p' Makefile
	@echo "make lint        style, types and the architecture contract"
	@echo "make minkowski   build the real MinkowskiEngine (CPU) into $(VENV), once, cached outside the tree"

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "bifusion-diag needs Python 3.10 or newer; $(PYTHON) is older. Try: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 2; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV) || \
		{ echo "cannot create $(VENV): install your distribution's venv package (Debian: python3-venv)"; exit 2; }
	@echo "installing bifusion-diag and its dependencies into $(VENV) (torch is large: a few minutes, once)"
	@$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: install
	@$(PY) -m bifusion_diag demo --out runs/demo

test: install
	@$(PY) -m pytest

lint: install
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy
	@$(VENV)/bin/lint-imports

minkowski: install
	@scripts/build_minkowski.sh $(VENV)

clean:
	rm -rf $(VENV) build dist *.egg-info runs
