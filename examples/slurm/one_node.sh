#!/bin/bash
# One stage on the GPUs of one machine, 8 or what GPUS says:
#
#     DATA=mixture.yaml MODEL=converted/hf TOKENIZER=converted/hf PRETRAINED=converted OUT=runs/stage1 examples/slurm/one_node.sh [flags]
#
# It runs rsa_megatron.training, which is examples/pretrain_llava_rsa.py. MODEL (demo) and STAGE (1) choose the recipe. Any Megatron or --rsa-* flag can follow; the last one counts.
# Run again with the same OUT, it goes on from the last checkpoint. `sbatch` takes this file too.
#SBATCH --job-name=llava-rsa
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@600
set -euo pipefail
: "${DATA:?set DATA to a prepared Energon data set or a mixture (.yaml)}"
: "${TOKENIZER:?set TOKENIZER to a folder in Hugging Face format}"
: "${OUT:?set OUT to the folder for checkpoints and TensorBoard}"

# Megatron asks for it under tensor parallelism: communication keeps its place in the queue before computation.
export CUDA_DEVICE_MAX_CONNECTIONS=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
# At a signal the ranks end their iteration and save; torchrun kills them after this many seconds.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-540}

cd "${SLURM_SUBMIT_DIR:-.}"
# The distributed optimizer shards Adam's state over the data-parallel ranks; overlapping hides its communication
# behind the backward pass. Fully reshardable checkpoints can be resumed under another TP x PP. (GPU_FLAGS= for a CPU.)
gpu_flags=${GPU_FLAGS---bf16 --use-distributed-optimizer --dist-ckpt-optim-fully-reshardable --overlap-grad-reduce}
# shellcheck disable=SC2086  # several flags
exec torchrun --standalone --nproc-per-node "${GPUS:-8}" -m rsa_megatron.training \
  --model "${MODEL:-demo}" --stage "${STAGE:-1}" \
  --data-path "$DATA" --tokenizer-model "$TOKENIZER" \
  ${PRETRAINED:+--pretrained-checkpoint "$PRETRAINED"} \
  --load "$OUT" --save "$OUT" --tensorboard-dir "$OUT/tensorboard" \
  $gpu_flags \
  "$@"
