# make demo            trains the demo model with the RSA loss and shows what came of it
# make demo-compare    the demo under four seeds, with and without RSA
# make demo-stages     its three stages, with and without RSA, and mutual-kNN after each
# make reproduce       the paper's comparisons scaled down: three seeds, three stages, ablations; 59 minutes on two cores
# make reproduce-openmoji    stage 1 with and without RSA on natural pictures, from the backbones of that
# make revision        projectors trained on text in the place of images, three seeds; half an hour on two cores
# make test            runs the tests (make test ARGS="tests/unit -k anyres"; the twenty slowest are printed at the end)
# make check           lint, format, units and one layout of each kind: what one runs before a commit
# make bench           runs the benchmarks (most of an hour; make bench BENCHMARKS=whole_step runs one)
# Each does all of its own set-up: a virtual environment in .venv, with everything from PyPI.
# make demo SEED=1 RSA="--rsa-weight 0" OUT=demo/other    (RSA: any flags of Megatron or of RSA)

VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
DEMO := demo
OUT := $(DEMO)
SEED := 1
SEEDS := 1 2 3 1234

.PHONY: demo demo-compare demo-stages reproduce reproduce-openmoji revision test check bench clean
.DELETE_ON_ERROR:

$(INSTALLED): pyproject.toml
	@python=$$(sh .ci/find-python) || exit 1; \
	echo "[set-up] $$($$python --version) in $(VENV); installing from PyPI (about 6 GB, a few minutes)"; \
	$$python -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "[set-up] $$python cannot make virtual environments; on Debian and Ubuntu install python3.12-venv"; exit 1; }
	@begin=$$(date +%s); \
	$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[train,plots,dev,openmoji]' || exit 1; \
	echo "[set-up] installed in $$(( $$(date +%s) - begin )) s"
	@touch $@

# The plugin is tried under these too, each in a folder of its own.
CORES := $(addprefix $(VENV)/megatron-core-,0.16.1 0.17.1 0.18.2)

$(CORES): | $(INSTALLED)
	@echo "[set-up] $(@F), for the tests"
	@rm -rf $@.part
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --target $@.part megatron-core==$(@F:megatron-core-%=%)
	@mv $@.part $@

# On two workers; make test WORKERS=8 on a larger machine. Named files, or anything else in ARGS, run in one process.
WORKERS := 2
PARALLEL = --numprocesses $(WORKERS) --dist loadfile --durations 20 --quiet

test: $(INSTALLED) $(CORES)
	@$(PY) -m pytest $(or $(ARGS),$(PARALLEL))

check: $(INSTALLED)
	@$(PY) -m ruff check --quiet . && $(PY) -m ruff format --check --quiet .
	@$(PY) -m pytest $(PARALLEL) -m check $(ARGS)

BENCHMARKS := rsa_loss rsa_ranks rsa_on_paper whole_step against_huggingface loader waiting_for_data start_up mutual_knn conversion task_encoder realign
bench: $(INSTALLED)
	@for name in $(BENCHMARKS); do \
	  echo "[$$name]"; $(PY) benchmarks/$$name.py --append results/benchmarks.jsonl || exit 1; \
	done

# In these, finished jobs are not repeated, and a run that was killed resumes from its checkpoint. ARGS: more flags of the script.
DEMO_RUN = $(PY) examples/demo/demo.py --out $(OUT) --data $(DEMO) --seed $(SEED) --seeds $(SEEDS)
demo: $(INSTALLED)
	@$(DEMO_RUN) $(ARGS) -- $(RSA)

demo-compare demo-stages: demo-%: $(INSTALLED)
	@$(DEMO_RUN) --$* $(ARGS) -- $(RSA)

# FULL=--full: longer runs, for a machine with many cores.
reproduce: $(INSTALLED)
	@$(PY) examples/reproduce/reproduce.py $(FULL) $(ARGS)

reproduce-openmoji: $(INSTALLED)
	@$(PY) examples/reproduce/reproduce.py --data openmoji $(FULL) $(ARGS)

revision: $(INSTALLED)
	@$(PY) examples/demo/prepare_data.py --out $(DEMO) --kinds captions
	@$(PY) examples/revision/revision.py --demo $(DEMO) $(ARGS)

clean:
	rm -rf $(DEMO)
