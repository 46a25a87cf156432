# Everything runs in .venv. Each target first installs there what it needs, and nothing of what others need; a second call starts
# at once. On a machine with a GPU, `make gpu-check` and `make gpu-bench` use PYTHON and the CUDA build of torch that it has.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check
CSRC := $(shell find csrc -type f) setup.py pyproject.toml

.PHONY: install demo test fuzz lint format docs wheel wheel-check bench sanitize gpu-check gpu-bench clean

install: $(VENV)/.installed

$(RUN):
	$(PYTHON) -m venv $(VENV)

# A stamp for each file of requirements/.
$(VENV)/.%: requirements/%.txt | $(RUN)
	$(PIP) -r $<
	touch $@

$(VENV)/.test $(VENV)/.docs $(VENV)/.installed: $(VENV)/.demo
$(VENV)/.dev $(VENV)/.bench: $(VENV)/.test

$(VENV)/.installed: $(CSRC)
	$(PIP) --no-build-isolation --no-deps -e .
	touch $@

demo: install
	$(RUN) -m metafast demo

# A process a core, each with one thread: threads of several processes would only wait for each other.
test: install $(VENV)/.test
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --dist worksteal

# Random learners and ops in their thousands, and all cases of the tests that take some of them otherwise: hours of one core.
EXAMPLES ?= 5000
fuzz: install $(VENV)/.test
	METAFAST_FUZZ_EXAMPLES=$(EXAMPLES) METAFAST_FULL=1 OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --dist worksteal \
	  tests/test_fuzz.py tests/test_torch_functions.py tests/test_torch_modules.py tests/test_peft.py tests/test_meta_fsdp.py \
	  tests/test_attention_triton.py tests/test_embedding_rows.py tests/test_huggingface_table.py tests/test_task_update.py

lint: $(VENV)/.dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/lint-imports

format: $(VENV)/.dev
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

docs: $(VENV)/.docs
	$(RUN) -m mkdocs build --strict

# A source distribution, and from it a wheel, which is tagged with the oldest Linux that it runs on. Torch's libraries stay torch's.
wheel: $(VENV)/.dev
	rm -rf dist
	$(RUN) -m build --no-isolation --outdir dist/linux
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" auditwheel repair --strip --exclude "libtorch*.so" --exclude libc10.so --wheel-dir dist dist/linux/*.whl
	mv dist/linux/*.tar.gz dist
	rm -r dist/linux

wheel-check: wheel
	.ci/wheel-check

# SUITES="attention memory" picks suites, all without it; BENCH="--compile --select causal" passes options on.
SUITES ?=
BENCH ?=
bench: install $(VENV)/.bench
	$(RUN) -m metafast bench $(SUITES) $(BENCH)

# The kernels with AddressSanitizer and UndefinedBehaviorSanitizer, built apart, under the tests that call them most. Leaks
# are not looked for: the interpreter and torch keep much until the end.
SANITIZED := build/sanitize/lib
sanitize: $(VENV)/.test
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
	rm -rf $(VENV) build dist site metafast/*.so *.egg-info
