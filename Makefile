# make demo            trains the demo model with the RSA loss and shows what came of it
# make demo-compare    the demo under four seeds, with and without RSA
# make demo-stages     all three stages of the demo model, with and without RSA, and mutual-kNN after each
# make reproduce       the paper's comparisons in small: three seeds, three stages, ablations; 59 minutes on two cores
# make reproduce-openmoji    stage 1 with and without RSA on natural pictures, after that
# make revision        projectors trained on text in the place of images, three seeds; half an hour on two cores
# make test            runs the tests (make test ARGS="tests/unit -k anyres"; the twenty slowest are printed at the end)
# make check           lint, format, units and one layout of each kind: what one runs before a commit
# make bench           runs the benchmarks (most of an hour; make bench BENCHMARKS=whole_step runs one)
# Each does all of its own set-up: a virtual environment in .venv, with everything from PyPI.
# make demo SEED=1 RSA="--rsa-weight 0" OUT=demo/other    (any Megatron flag can stand in RSA)

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c

VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
DEMO := demo
OUT := $(DEMO)
RUN := stage1
SEED := 1
RSA :=

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

# The demo. What is there already is not done again; a run that was interrupted is taken up where it was.

# On NVIDIA GPUs a process each, at most two; on the CPU two processes that share the cores.
PROCESSES = $(shell $(PY) -c "import torch; print(min(torch.cuda.device_count(), 2) or 2)")
TORCHRUN = OMP_NUM_THREADS=$$(( ($$(nproc) + 1) / 2 )) $(VENV)/bin/torchrun --standalone --nproc-per-node $(PROCESSES)
FLAGS = --data-path $(DEMO)/data/captions --tokenizer-model $(DEMO)/tokenizer --seed $(SEED)
STAGE_1 = $(TORCHRUN) examples/pretrain_llava_rsa.py --model demo --stage 1 --train-iters 300 $(FLAGS) --pretrained-checkpoint $(OUT)/parts
# The whole output goes to a log, the lines that tell the story to the screen: iterations with their losses,
# mutual-kNN, errors.
STORY = sed --unbuffered --quiet --regexp-extended \
  --expression '/^error|^\[stage|skipped sample|mutual-knn value/p' \
  --expression 's/.*(iteration +[0-9]+\/ *[0-9]+) \|.*\| (lm loss: .*) \| loss scale.*/ \1 | \2/p'

# A run in a folder is the run of its settings: others would be shown under a wrong name.
SETTINGS = seed $(SEED) $(RSA)

demo: $(INSTALLED)
	@echo "[1] data: scenes with captions, as Energon shards, and a tokenizer"
	@$(PY) examples/demo/prepare_data.py --out $(DEMO) --kinds captions
	@mkdir -p $(OUT)/$(RUN)
	@if [ -s $(OUT)/$(RUN)/settings ] && [ "$$(cat $(OUT)/$(RUN)/settings)" != '$(SETTINGS)' ]; then \
	  echo "error: $(OUT)/$(RUN) holds a run of other settings: $$(cat $(OUT)/$(RUN)/settings); name another OUT=folder"; exit 1; fi
	@echo '$(SETTINGS)' > $(OUT)/$(RUN)/settings
	@$(MAKE) --silent $(OUT)/parts/done $(OUT)/before.log $(OUT)/$(RUN)/done
	@echo "[5] what came of it"
	@$(PY) examples/demo/plot_runs.py --group "stage 1" $(OUT)/$(RUN)/metrics.jsonl --out $(OUT)/$(RUN)/run.png
	@echo "[6] to Hugging Face, and a held-out scene captioned with transformers (after four minutes of training: expect its form, not its truth)"
	@$(PY) -m checkpoint_conversion megatron-to-hf --checkpoint $(OUT)/$(RUN) --out $(OUT)/$(RUN)/exported --overwrite
	@$(PY) examples/demo/caption_image.py --hf $(OUT)/$(RUN)/exported --data $(DEMO)/data/captions

# The pipe's last part always succeeds: what counts is how torchrun ended.
OR_STOP = [ "$${PIPESTATUS[0]}" = 0 ] || { echo "error: this step failed; see $(1)"; exit 1; }

$(OUT)/parts/done:
	@echo "[2] the parts that training starts from: a language model of captions, a tower that knows scenes (two minutes)"
	@mkdir -p $(@D)
	@$(TORCHRUN) examples/demo/pretrain_backbones.py $(FLAGS) --load $(@D) --save $(@D) 2>&1 \
	  | tee -a $(@D)/run.log | $(STORY); $(call OR_STOP,$(@D)/run.log)
	@touch $@

$(OUT)/before.log: $(OUT)/parts/done
	@echo "[3] mutual-kNN of the two backbones before training"
	@$(STAGE_1) --skip-train --metrics-file $(OUT)/before.jsonl 2>&1 | tee $@.part | $(STORY); $(call OR_STOP,$@.part)
	@mv $@.part $@

$(OUT)/$(RUN)/done: $(OUT)/before.log
	@echo "[4] stage 1: the tower and the projector learn, the language model is frozen (four minutes) $(RSA)"
	@[ -e $(@D)/metrics.jsonl ] || cp $(OUT)/before.jsonl $(@D)/metrics.jsonl
	@$(STAGE_1) --load $(@D) --save $(@D) --tensorboard-dir $(@D)/tensorboard $(RSA) 2>&1 \
	  | tee -a $(@D)/run.log | $(STORY); $(call OR_STOP,$(@D)/run.log)
	@touch $@

SEEDS := 1 2 3 1234
METRICS = $(foreach seed,$(SEEDS),$(DEMO)/seed-$(seed)/$(1)/metrics.jsonl)

demo-compare:
	@for seed in $(SEEDS); do \
	  $(MAKE) --no-print-directory demo SEED=$$seed OUT=$(DEMO)/seed-$$seed || exit 1; \
	  $(MAKE) --no-print-directory demo SEED=$$seed OUT=$(DEMO)/seed-$$seed RUN=without-rsa RSA="--rsa-weight 0" || exit 1; \
	done
	@$(PY) examples/demo/plot_runs.py --group "with RSA" $(call METRICS,stage1) --group "without" $(call METRICS,without-rsa) \
	  --out results/demo.png --jsonl results/demo.jsonl

# The first stage is shorter here than in `make demo`. What is done is not done again.
STAGES_OUT = $(OUT)/stages
RUN_STAGES = PATH=$(CURDIR)/$(VENV)/bin:$$PATH OMP_NUM_THREADS=$$(( ($$(nproc) + 1) / 2 )) GPU_FLAGS= GPUS=$(PROCESSES) MODEL=demo \
  DATA=$(DEMO)/data TOKENIZER=$(DEMO)/tokenizer PRETRAINED=$(OUT)/parts STAGE1_FLAGS="--train-iters 150 --eval-interval 1000" \
  STAGE1_5_FLAGS="--train-iters 60" STAGE2_FLAGS="--train-iters 40" \
  examples/run_stages.sh --seed $(SEED)
demo-stages: $(INSTALLED)
	@echo "[1] data: captions, questions, written words and texts, and a tokenizer"
	@$(PY) examples/demo/prepare_data.py --out $(DEMO)
	@mkdir -p $(STAGES_OUT)
	@if [ -s $(STAGES_OUT)/settings ] && [ "$$(cat $(STAGES_OUT)/settings)" != '$(SETTINGS)' ]; then \
	  echo "error: $(STAGES_OUT) holds runs of other settings: $$(cat $(STAGES_OUT)/settings); name another OUT=folder"; exit 1; fi
	@echo '$(SETTINGS)' > $(STAGES_OUT)/settings
	@$(MAKE) --silent $(OUT)/parts/done $(OUT)/before.log
	@echo "[4] the three stages with RSA, then without; two times five minutes"
	@OUT=$(STAGES_OUT)/with-rsa $(RUN_STAGES) $(RSA) 2>&1 | $(STORY); $(call OR_STOP,$(STAGES_OUT)/with-rsa)
	@OUT=$(STAGES_OUT)/without $(RUN_STAGES) $(RSA) --rsa-weight 0 2>&1 | $(STORY); $(call OR_STOP,$(STAGES_OUT)/without)
	@echo "[5] what came of it"
	@$(PY) examples/demo/plot_stages.py --before $(OUT)/before.jsonl --run "with RSA" $(STAGES_OUT)/with-rsa \
	  --run "without" $(STAGES_OUT)/without --out $(STAGES_OUT)/stages.png --jsonl $(STAGES_OUT)/stages.jsonl

# What is done is not done again. FULL=--full: longer runs, for a machine with many cores.
FULL :=
reproduce: $(INSTALLED)
	@$(PY) examples/reproduce/reproduce.py $(FULL) $(ARGS)

# Stage 1 on natural pictures with their names, from the parts of `make reproduce`.
reproduce-openmoji: $(INSTALLED)
	@$(PY) examples/reproduce/reproduce.py --data openmoji $(FULL) $(ARGS)

# ReVision in small. What is done is not done again.
revision: $(INSTALLED)
	@$(PY) examples/demo/prepare_data.py --out $(DEMO) --kinds captions
	@$(PY) examples/revision/revision.py --demo $(DEMO) $(ARGS)

clean:
	rm -rf $(DEMO)
