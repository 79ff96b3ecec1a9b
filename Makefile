# `make demo` and `make test` are the two commands to begin with; README.md says what they do.
PYTHON ?= python3
BIN := .venv/bin
SCENES := data/scenes
NOTEBOOKS := $(sort $(wildcard [0-3]_*.ipynb))

.PHONY: setup demo test check lint app bench notebooks

setup: .venv/installed

.venv/installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	touch $@

demo: setup
	$(BIN)/python scenes.py $(SCENES)
	$(BIN)/python pretrain.py --data $(SCENES) --weights models/photos --out models/scenes-backbone.pth --image-size 96
	$(BIN)/python train.py --data $(SCENES) --name scenes --weights models/scenes-backbone.pth --image-size 96 \
	    --hidden-size 256 --tie-weights --dropout 0.1 --batch-size 24 --learning-rate 3e-3 --num-epochs 5 \
	    --print-every 500 --overwrite
	$(BIN)/python evaluate.py --model models/scenes --data $(SCENES) --split test
	$(BIN)/python caption.py $(SCENES)/images/test/00000200000[1-9].jpg $(SCENES)/images/test/00000200001[0-2].jpg --model models/scenes --sheet models/scenes/captions.png

test: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" $(MAKE) check

check: lint
	pytest
	NOTEBOOK_QUICK=1 pytest --nbmake --nbmake-timeout=600 $(NOTEBOOKS)

lint:
	ruff check .
	ruff format --check .

app: setup
	$(BIN)/python gradio_main.py

bench: setup
	$(BIN)/python -m benchmarks.speed

notebooks: setup
	$(BIN)/jupyter nbconvert --to notebook --execute --inplace $(NOTEBOOKS)
