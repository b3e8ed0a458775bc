# make demo            trains the demo model with the RSA loss and shows what came of it: make demo SEED=1 RSA="--rsa-weight 0" OUT=demo/other
# make demo-compare    the demo under four seeds, with and without RSA;  demo-stages: its three stages
# make reproduce       the paper's comparisons scaled down, 59 minutes on two cores;  reproduce-openmoji: then stage 1 on natural pictures
# make revision        projectors trained on text in the place of images, three seeds; half an hour on two cores
# make test            runs the tests (make test ARGS="tests/unit -k anyres"; the twenty slowest are printed at the end)
# make check           lint, format, units and one layout of each kind: what one runs before a commit
# make bench           runs the benchmarks (most of an hour; make bench BENCHMARKS=whole_step runs one)
# Each does all of its own set-up: a virtual environment in .venv, with everything from PyPI. Finished work is not repeated, and a
# run that was killed resumes from its checkpoint. RSA: any flags of Megatron or of RSA. ARGS: more flags of the script.

VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
DEMO := demo
OUT := $(DEMO)
SEED := 1
SEEDS := 1 2 3 1234

.PHONY: demo demo-compare demo-stages reproduce reproduce-openmoji revision test check bench clean

$(INSTALLED): pyproject.toml
	@sh .ci/set-up $(VENV)

# The plugin is tried under these too, each in a folder of its own.
CORES := $(addprefix $(VENV)/megatron-core-,0.16.1 0.17.1 0.18.2)
$(CORES): | $(INSTALLED)
	@sh .ci/set-up $(VENV) $(@F:megatron-core-%=%)

# On two workers; make test WORKERS=8 on a larger machine. Named files, or anything else in ARGS, run in one process.
WORKERS := 2
PARALLEL = --numprocesses $(WORKERS) --dist loadfile --durations 20 --quiet
test: $(INSTALLED) $(CORES)
	@$(PY) -m pytest $(or $(ARGS),$(PARALLEL))

check: $(INSTALLED)
	@$(PY) -m ruff check --quiet . && $(PY) -m ruff format --check --quiet .
	@$(PY) -m pytest $(PARALLEL) -m check $(ARGS)

BENCHMARKS := rsa_loss rsa_ranks rsa_on_paper whole_step against_huggingface packing loader waiting_for_data start_up mutual_knn conversion task_encoder realign
bench: $(INSTALLED)
	@for name in $(BENCHMARKS); do \
	  echo "[$$name]"; $(PY) benchmarks/$$name.py --append results/benchmarks.jsonl || exit 1; \
	done

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
