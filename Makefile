# `make demo` and `make test` do everything, set-up included, in an environment of their own (.venv).
PYTHON ?= python3
PY = .venv/bin/python

.PHONY: help demo results test test-slow test-gpu clean-demo

help:
	@echo "make demo        install, make synthetic tiles, filter, train, evaluate (minutes; an interrupted demo goes on)"
	@echo "make results     repeat the comparisons of docs/results/demo into my_results/demo (hours; it goes on, too)"
	@echo "make test        install, lint, run the tests (real tissue: CRC_REAL_DATA=DIR make test)"
	@echo "make test-slow   the tests that take minutes each"
	@echo "make test-gpu    the tests that need a CUDA GPU, and a table of what they measure (CRC_GPU_JSON=FILE keeps it)"
	@echo "make clean-demo  remove what the demo wrote: data/demo and runs/demo"

.venv/bin/python:
	$(PYTHON) -m venv .venv || { rm -rf .venv; echo "on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }

.venv/installed: requirements.txt | .venv/bin/python
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/installed-dev: requirements-dev.txt requirements.txt | .venv/bin/python
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@ .venv/installed

data/demo/frames: | .venv/installed
	$(PY) -m tools.make_demo_data data/demo --tiles 240 --slides 40 --seed 0

data/demo/tiles.csv: | data/demo/frames
	$(PY) data_filter.py --config configs/demo.yaml

demo: .venv/installed data/demo/tiles.csv
	@if [ -d runs/demo ]; then $(PY) train.py --resume runs/demo; else $(PY) train.py --config configs/demo.yaml; fi
	$(PY) evaluate.py runs/demo
	@echo "open runs/demo/evaluation/report.html in a browser"

results: .venv/installed
	$(PY) -m tools.results demo --out my_results/demo

test: .venv/installed-dev
	$(PY) -m ruff check .
	$(PY) -m pytest -q

test-slow: .venv/installed-dev
	$(PY) -m pytest -q -n 0 -m slow

test-gpu: .venv/installed-dev
	$(PY) -m pytest -q -n 0 -m gpu tests/gpu

clean-demo:
	rm -rf data/demo runs/demo
