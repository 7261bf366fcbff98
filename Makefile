# Everything a fresh clone needs: each target makes its own virtual environment first. Only Python (>= 3.10) with its
# headers (python3-dev), g++ and make have to be there. TORCH takes any pip arguments that name a torch.
PYTHON ?= python3
TORCH ?= torch==2.13.0
CUDA_TORCH ?= torch==2.14.1
CUDA_ARCHS ?= 9.0
WORKERS ?= 2
PYTEST_ARGS ?=
BENCH_ARGS ?=
DEMO_ARGS ?=
MATRIX_ARGS ?=
# Of the tests in frameworks, those of these: FRAMEWORKS="lightning peft". All of them if none is named.
FRAMEWORKS ?=
# Of the tests that take long where they run, on CUDA tensors (`make double`) or on emulated processors, every so manieth.
EVERY ?= 1

VENV := .venv
BIN := $(VENV)/bin
CUDA_TREE := build/cuda-check
ON_DOUBLE := build/double/run/python .venv-cuda/bin/pytest -q -n $(WORKERS) $(PYTEST_ARGS)
PIP := pip install --disable-pip-version-check --no-input
BUILD_TOOLS := 'setuptools>=70.1' ninja numpy
# What the native module is made of: a change here rebuilds it (ninja compiles only what the change reaches).
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)
CXX_FILES = $(shell find csrc tests/cpp tests/cuda_double -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help demo test bench wheel sdist docs docs-browser lint format cpp-test sanitize arm-check arm-tools old-cpu-check old-cpu-tools cuda-check double double-build frameworks matrix clean
.DELETE_ON_ERROR:

help:
	@echo 'make demo        train a small network with torch.optim and with optim_ext and compare'
	@echo 'make test        all tests (PYTEST_ARGS=...)'
	@echo 'make bench       time of a step against torch.optim (BENCH_ARGS=...)'
	@echo 'make wheel       dist/*.whl for this torch, Python and processor ;  make sdist: the sources, to be built elsewhere'
	@echo 'make docs        the site, into build/site ;  make docs-browser opens every page in a Chromium that is installed'
	@echo 'make lint        formatters in check mode, ruff, types, the include rule;  make format mends the layout'
	@echo 'make cpp-test    C++ tests of the torch-free code ;  make sanitize runs them under sanitizers'
	@echo 'make arm-check   the C++ tests for ARM64, in an emulator ;  make old-cpu-check: C++ tests and a step of every class on'
	@echo '                 emulated processors without AVX and with AVX2 (EVERY=11: of what is slow one case in 11)'
	@echo 'make cuda-check  compile the CUDA part against $(CUDA_TORCH) and test that build, without a GPU'
	@echo 'make double      tests on CUDA tensors, on a double of the CUDA runtime without a GPU (EVERY=12: one of 12 tests)'
	@echo 'make frameworks  short trainings in Lightning, transformers and others (FRAMEWORKS="lightning peft": these alone)'
	@echo 'make matrix      build and test with every torch and every Python (MATRIX_ARGS="--every 5 2.12.1 2.13.0/3.12")'

demo: $(VENV)/demo.stamp
	$(BIN)/python examples/train_digits.py $(DEMO_ARGS)

test: $(VENV)/test.stamp
	$(BIN)/pytest -n $(WORKERS) $(PYTEST_ARGS)

bench: $(VENV)/bench.stamp $(VENV)/peers.stamp
	$(BIN)/python benchmarks/step_time.py $(BENCH_ARGS)

# An environment with torch and what builds need.
$(VENV)/torch.stamp .venv-cuda/torch.stamp: %/torch.stamp:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "optim_ext needs Python 3.10 or newer")'
	$(PYTHON) -m venv $*
	$*/bin/$(PIP) $(TORCH) $(BUILD_TOOLS)
	touch $@

define FOR_WHAT_IS_HERE
if [ -z "$$OPTIM_EXT_CUDA" ] && $(BIN)/python -c 'import sys, torch; sys.exit(torch.cuda.is_available())'; then \
  echo 'no GPU is visible: building for the CPU only (OPTIM_EXT_CUDA=1 builds the CUDA part all the same)'; \
  export OPTIM_EXT_CUDA=0; \
fi;
endef

# optim_ext built into that environment, with the requirements of one purpose (an extra of pyproject.toml). CUDA kernels
# take minutes to compile and cannot be run without a GPU.
PURPOSES := demo test bench lint
$(PURPOSES:%=$(VENV)/%.stamp): $(VENV)/%.stamp: $(VENV)/torch.stamp $(SOURCES)
	@$(FOR_WHAT_IS_HERE) \
	$(BIN)/python .ci/quietly.py build/$*.log $(BIN)/$(PIP) --no-build-isolation --verbose -e '.[$*]'
	touch $@

# What optim_ext is measured against besides torch. The benchmark goes on where that cannot be installed; the next call of
# `make bench` tries again.
$(VENV)/peers.stamp: benchmarks/requirements.txt | $(VENV)/bench.stamp
	$(BIN)/$(PIP) --no-build-isolation -r benchmarks/requirements.txt && touch $@ || true

# A build in place leaves objects that a wheel of the same sources is linked from.
wheel: $(VENV)/demo.stamp
	@$(FOR_WHAT_IS_HERE) \
	$(BIN)/python .ci/quietly.py build/wheel.log \
	  $(BIN)/pip wheel --disable-pip-version-check --verbose --no-build-isolation --no-deps --wheel-dir dist .

sdist: $(VENV)/torch.stamp
	$(BIN)/python setup.py --quiet sdist

# The site, in an environment without torch: sources are read, not imported, so nothing has to be built.
.venv-docs/docs.stamp: pyproject.toml
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/$(PIP) $$(.venv-docs/bin/python .ci/extra.py docs)
	touch $@

docs: .venv-docs/docs.stamp
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build
	.venv-docs/bin/python .ci/site/check.py build/site

.venv-docs/browser.stamp: .venv-docs/docs.stamp
	.venv-docs/bin/$(PIP) playwright==1.65.2
	touch $@

docs-browser: docs .venv-docs/browser.stamp
	.venv-docs/bin/python .ci/site/open_pages.py build/site $(SCREENSHOTS)

lint: $(VENV)/lint.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/mypy
	$(BIN)/mypy --strict tests/typing/*.py
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python .ci/rooms.py

format: $(VENV)/lint.stamp
	$(BIN)/ruff check --fix --exit-zero .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

# The torch-free code and its tests, which want neither torch nor the module.
build/tools/cmake.stamp:
	$(PYTHON) -m venv build/tools
	build/tools/bin/$(PIP) 'cmake>=3.21'
	touch $@

define CPP_TEST
build/tools/bin/cmake -S . -B build/$@ $(1)
build/tools/bin/cmake --build build/$@ -j $(WORKERS)
build/tools/bin/ctest --test-dir build/$@ -j $(WORKERS) --output-on-failure
endef

# The kernels of a module that was built in place are linked, where they are made of the sources as they are now.
KERNELS_AT_HAND = -DOPTIM_EXT_KERNELS="$$(test ! -f $(VENV)/test.stamp || $(BIN)/python .ci/kernel_objects.py)"
cpp-test: build/tools/cmake.stamp
	$(call CPP_TEST,$(KERNELS_AT_HAND))

sanitize: build/tools/cmake.stamp
	$(call CPP_TEST,-DOPTIM_EXT_SANITIZE=ON)

# Other processors than this one.
arm-check old-cpu-check: export OPTIM_EXT_EVERY = $(EVERY)

arm-check: arm-tools build/tools/cmake.stamp
	$(call CPP_TEST,--toolchain tests/cpp/arm64.cmake)

old-cpu-check: old-cpu-tools $(VENV)/test.stamp
	$(BIN)/pytest -n $(WORKERS) $(PYTEST_ARGS) tests/package/emulated

# Programs, and Debian's packages that have them: what is missing is named before anything is built.
define INSTALLED
@missing=; for both in $(1); do command -v $${both%:*} >/dev/null || missing="$$missing $${both#*:}"; done; \
if [ -n "$$missing" ]; then echo "to be installed, on Debian or Ubuntu: sudo apt-get install$$missing"; exit 1; fi
endef

arm-tools:
	$(call INSTALLED,aarch64-linux-gnu-g++:g++-aarch64-linux-gnu qemu-aarch64:qemu-user)

old-cpu-tools:
	$(call INSTALLED,qemu-x86_64:qemu-user)

# A CUDA build needs another torch. It gets its own environment and its own copy of the sources, so that the module that
# is built in place here stays as it is.
cuda-check: .venv-cuda/torch.stamp
	rm -rf $(CUDA_TREE)/csrc $(CUDA_TREE)/tests $(CUDA_TREE)/optim_ext/*.py
	mkdir -p $(CUDA_TREE)
	tar cf - --exclude='*.so' --exclude=_build_info.py --exclude=__pycache__ --exclude='./build' --exclude='./.[!c]*' . | \
	  tar xf - -C $(CUDA_TREE)
	cd $(CUDA_TREE) && OPTIM_EXT_CUDA=1 TORCH_CUDA_ARCH_LIST=$(CUDA_ARCHS) \
	  '$(CURDIR)'/.venv-cuda/bin/python .ci/quietly.py build/test.log \
	  '$(CURDIR)'/.venv-cuda/bin/$(PIP) --no-build-isolation --verbose -e '.[test]'
	cd $(CUDA_TREE) && '$(CURDIR)'/.venv-cuda/bin/python -m optim_ext
	cd $(CUDA_TREE) && '$(CURDIR)'/.venv-cuda/bin/python -m pytest -n $(WORKERS) $(PYTEST_ARGS) $(CUDA_CHECK_TESTS)

# The CUDA part compiled as C++, in torch, on a double of the CUDA runtime (docs/gpu.md). Takes headers of CUDA, no nvcc.
.venv-cuda/double.stamp: .venv-cuda/torch.stamp pyproject.toml
	.venv-cuda/bin/$(PIP) $$(.venv-cuda/bin/python .ci/extra.py test)
	touch $@

double-build: .venv-cuda/double.stamp
	.venv-cuda/bin/cmake -S . -B build/double -DOPTIM_EXT_DOUBLE=ON -DPYTHON='$(CURDIR)/.venv-cuda/bin/python' $(CMAKE_ARGS)
	.venv-cuda/bin/cmake --build build/double --target double -j $(WORKERS)

double: export OPTIM_EXT_SHARD = 0/$(EVERY)
double: double-build
	OPTIM_EXT_SHARD=0/1 $(ON_DOUBLE) tests/cuda_double
	$(ON_DOUBLE) tests/cuda
	OPTIM_EXT_TEST_DEVICE=cuda:0 $(ON_DOUBLE) $(FOR_ANY_DEVICE)
	CUDA_DOUBLE=lazy,closed $(ON_DOUBLE) $(ABOUT_STREAMS)
	CUDA_DOUBLE=guard $(ON_DOUBLE) $(ABOUT_MEMORY)
# What of them speaks of the CPU is marked so.
FOR_ANY_DEVICE := tests/optim tests/lbfgs tests/precision tests/distributed
ABOUT_STREAMS := $(addprefix tests/cuda/test_,launches.py grad_control.py lbfgs.py kept.py)
ABOUT_MEMORY := tests/cuda/test_lbfgs.py tests/cuda/test_numerics.py tests/cuda/test_kept.py -k 'lbfgs or layouts or frozen or mixed or any_order'

# Other people's frameworks stand on the environment of the tests: torch, pytest and optim_ext are its, and the frameworks have
# to be content with that torch, so that no second one is fetched.
ON_FRAMEWORKS := .venv-frameworks/bin/python -m
.venv-frameworks/frameworks.stamp: tests/frameworks/requirements.txt $(VENV)/torch.stamp | $(VENV)/test.stamp
	$(BIN)/python .ci/stand_on.py .venv-frameworks
	$(BIN)/python -m pip freeze | grep ^torch= > .venv-frameworks/torch.txt
	$(ON_FRAMEWORKS) $(PIP) --no-build-isolation -c .venv-frameworks/torch.txt -r $<
	touch $@

frameworks: $(VENV)/test.stamp .venv-frameworks/frameworks.stamp
	$(ON_FRAMEWORKS) pytest -n $(WORKERS) $(PYTEST_ARGS) \
	  $(if $(FRAMEWORKS),$(FRAMEWORKS:%=tests/frameworks/test_%.py),tests/frameworks $(STATE_OF_OTHERS))
# These, too, want packages that no other environment has to have.
STATE_OF_OTHERS := $(addprefix tests/precision/test_peers.py::test_the_real_,torchao bitsandbytes deepspeed)

# Other versions of torch and of Python, each in an environment that is removed again.
matrix:
	$(PYTHON) .ci/matrix.py --workers $(WORKERS) $(MATRIX_ARGS)

.venv-cuda/torch.stamp: override TORCH = $(CUDA_TORCH)
CUDA_CHECK_TESTS ?= tests/cuda tests/kernels tests/ops tests/user_rules/test_cuda_text.py

clean:
	rm -rf build dist *.egg-info .venv .venv-cuda .venv-docs .venv-frameworks .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -f optim_ext/*.so optim_ext/_build_info.py
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
