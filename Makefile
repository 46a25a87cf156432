# Everything runs in .venv, which the first target to need it makes; a second call starts at once.
# On a machine with a GPU, `make gpu-check` and `make gpu-bench` use PYTHON and the CUDA build of torch that it has.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
CSRC := $(shell find csrc -type f) setup.py pyproject.toml

.PHONY: install demo test fuzz lint format bench sanitize gpu-check gpu-bench clean

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

# A process a core, each with one thread: threads of several processes would only wait for each other.
test: install
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto

# Random learners and ops in their thousands, and all of torch's databases of modules and functions: hours of one core.
EXAMPLES ?= 5000
fuzz: install
	METAFAST_FUZZ_EXAMPLES=$(EXAMPLES) METAFAST_FULL=1 OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto \
	  tests/test_fuzz.py tests/test_torch_functions.py tests/test_torch_modules.py

lint: install
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: install
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

# SUITES="attention memory" picks suites, all without it; BENCH="--compile --select causal" passes options on. The extra brings
# the peers, without which their cases are skipped.
SUITES ?=
BENCH ?=
bench: install
	$(RUN) -m pip install --quiet --disable-pip-version-check "higher>=0.2.1" "torchopt>=0.7.3"
	$(RUN) -m metafast bench $(SUITES) $(BENCH)

# The kernels with AddressSanitizer and UndefinedBehaviorSanitizer, built apart, under the tests that call them most. Leaks
# are not looked for: the interpreter and torch keep much until the end.
SANITIZED := build/sanitize/lib
sanitize: install
	METAFAST_BUILD=cpu METAFAST_SANITIZE=1 $(RUN) setup.py -q build --build-base build/sanitize --build-lib $(SANITIZED)
	cd $(SANITIZED) && ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so)" \
	  $(CURDIR)/$(RUN) -m pytest -c $(CURDIR)/pyproject.toml -p no:cacheprovider -k "$(SANITIZE_TESTS)" \
	  $(CURDIR)/tests/test_task_update.py \
	  $(CURDIR)/tests/test_task_update_variants.py $(CURDIR)/tests/test_attention.py

SANITIZE_TESTS := (task_update and not transforms and not finite and not torch_optim) or \
  (test_attention.py and (float32 or bfloat16 or strides or empty or order_of_inputs))

gpu-check:
	$(PYTHON) setup.py build_ext --inplace
	$(PYTHON) -m pytest tests/test_gpu.py tests/test_attention_triton.py tests/test_task_update.py
	@if command -v compute-sanitizer > /dev/null; then \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1 --target-processes all \
	    $(PYTHON) -m pytest tests/test_task_update.py -k cuda_equals_cpu; \
	else echo "no compute-sanitizer: the kernels' memory accesses were not checked"; fi

gpu-bench:
	$(PYTHON) setup.py build_ext --inplace
	$(PYTHON) -m metafast.ops.attention.triton.tune
	$(PYTHON) -m metafast bench $(SUITES) --compile --out benchmarks/results $(BENCH)

clean:
	rm -rf $(VENV) build dist metafast/*.so *.egg-info
