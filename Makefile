# `make demo` and `make test` are the two commands to begin with; README.md says what they do.
PYTHON ?= python3
BIN := .venv/bin
SCENES := data/scenes
NOTEBOOKS := $(sort $(wildcard [0-3]_*.ipynb))
NBCONVERT := $(BIN)/jupyter nbconvert --to notebook --execute --ExecutePreprocessor.store_widget_state=False \
    --ExecutePreprocessor.record_timing=False
CHECK_PYTHON := import sys; (3, 10) <= sys.version_info < (3, 14) or sys.exit("Python 3.10 to 3.13 is needed: \
    delete .venv if it is there, then make setup PYTHON=python3.12")

.PHONY: setup demo test check lint app bench notebooks notebooks-commit

setup: .venv/installed

.venv/installed: requirements.txt requirements-dev.txt
	@test -e .venv || $(PYTHON) -c '$(CHECK_PYTHON)'
	$(PYTHON) -m venv .venv
	@$(BIN)/python -c '$(CHECK_PYTHON)'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	touch $@

demo: setup
	$(BIN)/python scenes.py $(SCENES)
	$(BIN)/python train.py --config configs/scenes.toml --overwrite
	$(BIN)/python evaluate.py --model models/scenes --data $(SCENES) --split test
	$(BIN)/python caption.py $(SCENES)/images/test/00000200000[1-9].jpg $(SCENES)/images/test/00000200001[0-2].jpg --model models/scenes --sheet models/scenes/captions.png

test: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" $(MAKE) check

check: lint
	pytest -n 2 --dist loadfile --no-loadscope-reorder

lint:
	ruff check .
	ruff format --check .
	pyright

app: setup
	$(BIN)/python gradio_main.py

bench: setup
	$(BIN)/python -m benchmarks.speed

notebooks: setup
	$(NBCONVERT) --output-dir build/notebooks $(NOTEBOOKS)

notebooks-commit: setup
	NOTEBOOK_COMMIT=1 $(NBCONVERT) --inplace $(NOTEBOOKS)
