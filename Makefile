# make demo    set up, train briefly, score a slide, say what to open
# make test    set up, run the tests
# make check   lint, types, layers, tests
# make bench   the tables of benchmarks/
# make map     the MONAI Application Package: its build context, and its image where Docker runs
# Each does its own set-up in .venv. On a machine with an NVIDIA GPU: make demo TORCH=torch

# ONNX Runtime, which MONAI imports, reports to its maker unless told not to
export ORT_DISABLE_TELEMETRY ?= 1

PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
SLIDE ?= demo/slide.tif
BUNDLE ?= bundles/s4mil_slide
# two files of tests at a time: most of them wait for processes
PYTEST = $(BIN)/pytest --numprocesses 2 --dist loadfile
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test check bench map clean

demo: .venv/.demo
	mkdir -p demo
	$(BIN)/python -W ignore -m monai.bundle run training --config_file bundles/s4mil_slide/configs/train.yaml \
	  --output_dir demo/training --train::trainer::max_epochs 5
	test "$(SLIDE)" != demo/slide.tif || $(BIN)/python -m s4mil_monai.demo demo/slide.tif
	$(BIN)/s4mil score "$(SLIDE)" --out demo/results $(if $(ASSUME_MPP),--assume_mpp $(ASSUME_MPP))
	@echo "Trained on the 58 UCSB breast slides: demo/training (model.pt, mlruns.db)"
	@echo "Scored $(SLIDE): open the report named above in a browser. Research use; not cleared for diagnosis."

test: .venv/.dev
	$(PYTEST)

check: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(PYTEST)

bench: .venv/.dev
	$(BIN)/python benchmarks/scoring.py
	$(BIN)/python benchmarks/tissue.py
	$(BIN)/python benchmarks/fuzz.py --mutations 200

# BUNDLE=… packs another model; ENCODER_WEIGHTS=… a file of its encoder that comes with no package
map: .venv/.dev
	rm -rf build/models
	$(BIN)/python -m deploy.stage_models --bundle $(BUNDLE) --out build/models \
	  $(if $(ENCODER_WEIGHTS),--encoder_weights $(ENCODER_WEIGHTS))
	$(BIN)/python -m deploy.make_map --models build/models --out build/map

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
	# Holoscan's wheel finishes its installation when Python is first started, and loads distutils for it, which
	# TorchInductor cannot stand: let that be here and not in the tests
	$(BIN)/python -c pass
	touch $@ .venv/.demo

clean:
	rm -rf .venv demo output results
