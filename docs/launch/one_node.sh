#!/bin/bash
# One machine with any number of GPUs: one process, which uses all that it sees.
#
#   bash docs/launch/one_node.sh FOLDER_OF_SHARDS
#   CUDA_VISIBLE_DEVICES=0,1 bash docs/launch/one_node.sh FOLDER_OF_SHARDS
#
# Ctrl-C or SIGTERM saves and ends it; the same command again goes on.
set -euo pipefail

exec python scripts/pretrain.py k-215m \
  --data.path "${1:?give the folder of token shards}" \
  --out runs/k-215m \
  --parallel.data -1 \
  --train.batch-size 1024 \
  --train.save-every 500
