#!/usr/bin/env bash
# examples/qwen3-32b.yaml for Megatron-LM's pretrain(): one node of 8 GPUs, 4 of them tensor-parallel.
# Megatron-LM is that of the installed megatron-core, or the checkout MEGATRON_LM. Not run on GPUs yet.
set -euo pipefail

if [ -n "${MEGATRON_LM:-}" ]; then
  export PYTHONPATH="$MEGATRON_LM${PYTHONPATH:+:$PYTHONPATH}"
fi
export CUDA_DEVICE_MAX_CONNECTIONS=1

target=(  # its architecture, as in its own launch script; the weights are read from TARGET
  --tokenizer-type HuggingFaceTokenizer
  --tokenizer-model "${TARGET:-models/Qwen3-32B}"
  --num-layers 64
  --hidden-size 5120
  --num-attention-heads 64
  --max-position-embeddings 40960
)
draft=(
  --dspark-num-layers 5
  --dspark-block-size 7
  --dspark-num-anchors 512
  --dspark-target-layer-ids 1 16 31 46 61
  --dspark-mask-token-id 151669
)
run=(
  --data-path "${DATA:-data/train.jsonl}"
  --seq-length 4096
  --micro-batch-size 1
  --global-batch-size 512
  --train-iters 20000
  --eval-iters 0
  --eval-interval 1000
  --save "${SAVE:-runs/qwen3-32b-dspark}"
  --load "${SAVE:-runs/qwen3-32b-dspark}"
  --save-interval 500
  --log-interval 10
)
optimizer=(
  --lr 6e-4
  --lr-decay-style cosine
  --lr-warmup-fraction 0.04
  --weight-decay 0
  --clip-grad 1.0
  --calculate-per-token-loss
)
parallel=(
  --tensor-model-parallel-size 4
  --sequence-parallel
  --use-distributed-optimizer
  --overlap-grad-reduce
  --bf16
  --recompute-granularity full
  --recompute-method uniform
  --recompute-num-layers 1
  --transformer-impl local
  --no-gradient-accumulation-fusion
)
exec torchrun --nproc-per-node "${GPUS:-8}" "$(dirname "$0")/pretrain_dspark.py" \
  "${target[@]}" "${draft[@]}" "${run[@]}" "${optimizer[@]}" "${parallel[@]}" "$@"
