# make demo        set up, train three small models on synthetic rooms, print where the HTML report lies
# make test        set up and pass the tests
# make lint        style, types and the architecture contract
# make minkowski   build the real MinkowskiEngine (CPU), once, cached outside the tree
PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.PHONY: help install demo test lint minkowski clean

help:
	@sed -n 's/^# //p' Makefile

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "bifusion-diag needs Python 3.10 or newer; $(PYTHON) is older. Try: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 2; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV) || \
		{ echo "cannot create $(VENV): install your distribution's venv package (Debian: python3-venv)"; exit 2; }
	@echo "installing bifusion-diag and its dependencies into $(VENV) (torch is large: a few minutes, once)"
	@$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

## The same commands work by hand, with more steps, other presets, or --data FOLDER.
DEMO := runs/demo
demo: install
	@for model in baseline-5cm bifusion-fragile bifusion; do \
		$(VENV)/bin/bifusion-diag train --model $$model --config examples/demo.yaml --probe all --out $(DEMO)/$$model.json \
			|| exit $$?; \
	done
	@$(VENV)/bin/bifusion-diag compare $(DEMO)/baseline-5cm.json $(DEMO)/bifusion-fragile.json $(DEMO)/bifusion.json \
		--html $(DEMO)/report.html

## Two processes of one thread each: small tensors gain nothing from a second thread. WORKERS=0 runs all in one.
WORKERS ?= 2
test: install
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m pytest -n $(WORKERS) --dist loadfile

lint: install
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy
	@$(VENV)/bin/lint-imports

minkowski: install
	@scripts/build_minkowski.sh $(VENV)

clean:
	rm -rf $(VENV) build dist *.egg-info runs
