# make demo    set up, train briefly, score a slide, say what to open
# make test    set up, run the tests
# make check   lint, types, layers, tests
# make bench   the tables of benchmarks/
# Each does its own set-up in .venv. On a machine with an NVIDIA GPU: make demo TORCH=torch

PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
SLIDE ?= demo/slide.tif
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test check bench clean

demo: .venv/.demo
	mkdir -p demo
	$(BIN)/python -W ignore -m monai.bundle run training --config_file bundles/s4mil_slide/configs/train.yaml \
	  --output_dir demo/training --train::trainer::max_epochs 5
	test "$(SLIDE)" != demo/slide.tif || $(BIN)/python -m s4mil_monai.demo demo/slide.tif
	$(BIN)/s4mil score "$(SLIDE)" --out demo/results $(if $(ASSUME_MPP),--assume_mpp $(ASSUME_MPP))
	@echo "Trained on the 58 UCSB breast slides: demo/training (model.pt, mlruns.db)"
	@echo "Scored $(SLIDE): open the report named above in a browser. Research use; not cleared for diagnosis."

test: .venv/.dev
	$(BIN)/pytest

check: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/pytest

bench: .venv/.dev
	$(BIN)/python benchmarks/scoring.py

.venv/bin/python:
	$(PYTHON) -m venv .venv

# torch first and by itself: the CPU build where the index has one, or whatever TORCH names
.venv/.torch: | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	touch $@

.venv/.demo: pyproject.toml constraints.txt .venv/.torch
	$(PIP) --editable '.[demo]'
	touch $@

.venv/.dev: pyproject.toml constraints.txt .venv/.torch
	$(PIP) --editable '.[dev]'
	touch $@ .venv/.demo

clean:
	rm -rf .venv demo output results
