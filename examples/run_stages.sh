#!/bin/bash
# The three stages in order, each from the weights of the one before. Run again, it goes on where it stopped.
#
#     DATA=data MODEL=converted/hf TOKENIZER=converted/hf PRETRAINED=converted OUT=runs/mine examples/run_stages.sh [flags]
#
# DATA holds stage1.yaml, stage1_5.yaml and stage2.yaml (examples/mixtures). The flags go to every stage; those of one
# alone stand in STAGE1_FLAGS, STAGE1_5_FLAGS and STAGE2_FLAGS. STAGES="1.5 2" leaves out the first.
# A stage is one run of RUN_STAGE, slurm/one_node.sh beside this file; on a cluster
#     RUN_STAGE="sbatch --wait --nodes 4 --output runs/mine/%j.out examples/slurm/multi_node.sbatch"
# A run that ends before its stage does (a time limit, a lost node) is started again, as long as it gets on.
set -euo pipefail
: "${DATA:?set DATA to the folder of stage1.yaml, stage1_5.yaml and stage2.yaml}"
: "${TOKENIZER:?set TOKENIZER to a folder in Hugging Face format}"
: "${OUT:?set OUT to the folder for the stages}"
previous=${PRETRAINED:-}

reached() { cat "$1/latest_checkpointed_iteration.txt" 2>/dev/null || echo 0; }
finished() { grep --quiet '"finished"' "$1/run.json" 2>/dev/null; }

for stage in ${STAGES:-1 1.5 2}; do
  name=stage${stage/./_}
  own_flags=${name^^}_FLAGS
  folder=$OUT/$name
  mkdir -p "$folder"
  if finished "$folder"; then
    echo "[stage $stage] was done before: $folder (to run it again, remove that or name another OUT)"
    previous=$folder
    continue
  fi
  while ! finished "$folder"; do
    before=$(reached "$folder")
    echo "[stage $stage] from iteration $before${previous:+, weights of $previous}; $folder/run.log"
    # shellcheck disable=SC2086  # commands and flags of several words
    DATA=$DATA/$name.yaml STAGE=$stage PRETRAINED=$previous OUT=$folder \
      ${RUN_STAGE:-$(dirname "$0")/slurm/one_node.sh} "$@" ${!own_flags:-} 2>&1 | tee -a "$folder/run.log" || true
    if ! finished "$folder" && [ "$(reached "$folder")" = "$before" ]; then
      echo "error: stage $stage ended at iteration $before, where it began; see $folder/run.log" >&2
      exit 1
    fi
  done
  echo "[stage $stage] done: $folder"
  previous=$folder
done
