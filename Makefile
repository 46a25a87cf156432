# Everything runs in .venv, which the first target to need it makes; a second call starts at once.
# On a machine with a GPU, `make gpu-check` and `make gpu-bench` use PYTHON and the CUDA build of torch that it has.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
CSRC := $(shell find csrc -type f) setup.py pyproject.toml

.PHONY: install demo test lint format bench gpu-check gpu-bench clean

install: $(VENV)/.installed

$(VENV)/.requirements: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.installed: $(VENV)/.requirements $(CSRC)
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	touch $@

demo: install
	$(RUN) -m metafast demo

test: install
	$(RUN) -m pytest

lint: install
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: install
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

bench: install
	$(RUN) -m metafast bench

gpu-check:
	$(PYTHON) setup.py build_ext --inplace
	$(PYTHON) -m pytest tests/test_gpu.py tests/test_attention_triton.py tests/test_task_update.py

gpu-bench:
	$(PYTHON) setup.py build_ext --inplace
	$(PYTHON) -m metafast bench --out benchmarks/results

clean:
	rm -rf $(VENV) build dist metafast/*.so *.egg-info
