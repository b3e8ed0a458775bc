# make demo    trains the demo model with the RSA loss and shows what came of it
# make test    runs the tests
# make bench   runs the benchmarks
# Each does all of its own set-up: a virtual environment in .venv, with everything from PyPI.

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c

VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
DEMO := demo

.PHONY: demo test bench clean
.DELETE_ON_ERROR:

$(INSTALLED): pyproject.toml
	@python=$$(sh .ci/find-python) || exit 1; \
	echo "[set-up] $$($$python --version) in $(VENV); installing from PyPI (about 6 GB, a few minutes)"; \
	$$python -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "[set-up] $$python cannot make virtual environments; on Debian and Ubuntu install python3.12-venv"; exit 1; }
	@$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[train,plots,dev]'
	@touch $@

test: $(INSTALLED)
	@$(PY) -m pytest $(ARGS)

bench: $(INSTALLED)
	@$(PY) benchmarks/rsa_loss.py --append results/benchmarks.jsonl $(ARGS)

# The demo. What is there already is not done again; a run that was interrupted is taken up where it was.

# On NVIDIA GPUs a process each, at most two; on the CPU two processes that share the cores.
PROCESSES = $(shell $(PY) -c "import torch; print(min(torch.cuda.device_count(), 2) or 2)")
RUN = OMP_NUM_THREADS=$$(( ($$(nproc) + 1) / 2 )) $(VENV)/bin/torchrun --standalone --nproc-per-node $(PROCESSES)
FLAGS = --data-path $(DEMO)/data/captions --tokenizer-model $(DEMO)/tokenizer
# The whole output goes to a file, the lines that tell the story to the screen.
STORY = grep --line-buffered -E 'iteration +[0-9]+/|mutual-knn value|^error|skipped sample' || true

demo: $(INSTALLED)
	@echo "[1/5] data: scenes with captions, as Energon shards, and a tokenizer"
	@$(PY) examples/prepare_demo.py --out $(DEMO)
	@$(MAKE) --no-print-directory $(DEMO)/parts/done $(DEMO)/before.log $(DEMO)/stage1/done
	@echo "[5/5] what came of it"
	@$(PY) examples/plot_run.py $(DEMO)/stage1/run.log --before $(DEMO)/before.log --out $(DEMO)/run.png

$(DEMO)/parts/done:
	@echo "[2/5] the parts that training starts from: a language model of captions, a tower that knows scenes (a minute)"
	@mkdir -p $(@D)
	@($(RUN) examples/pretrain_demo_parts.py $(FLAGS) --save $(@D) 2>&1 \
	  || echo "error: step 2 failed; see $(@D)/run.log") | tee $(@D)/run.log | { $(STORY); }
	@grep -q "after training is done" $(@D)/run.log && touch $@

$(DEMO)/before.log: $(DEMO)/parts/done
	@echo "[3/5] mutual-kNN of the two backbones before training"
	@($(RUN) examples/pretrain_llava_rsa.py --model demo --stage 1 $(FLAGS) --pretrained-checkpoint $(DEMO)/parts \
	  --skip-train 2>&1 || echo "error: step 3 failed; see $@.part") | tee $@.part | { $(STORY); }
	@grep -q "mutual-knn value" $@.part && mv $@.part $@

$(DEMO)/stage1/done: $(DEMO)/parts/done
	@echo "[4/5] stage 1 with the RSA loss: the tower and the projector learn, the language model is frozen"
	@mkdir -p $(@D)
	@($(RUN) examples/pretrain_llava_rsa.py --model demo --stage 1 $(FLAGS) --pretrained-checkpoint $(DEMO)/parts \
	  --load $(@D) --save $(@D) --tensorboard-dir $(@D)/tensorboard 2>&1 \
	  || echo "error: step 4 failed; see $(@D)/run.log") | tee -a $(@D)/run.log | { $(STORY); }
	@grep -q "after training is done" $(@D)/run.log && touch $@

clean:
	rm -rf $(DEMO)
