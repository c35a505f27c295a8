#!/usr/bin/env bash
# Train a Llama 3 in bf16 and in float8, and compare: tokens per second, memory, speedup.
#
#   FLOAT8_RECIPE_WITH_BEST_SETTINGS=tensorwise ./benchmarks/float8/training/llama3.sh
#   NGPU=8 PEER=1 FLOAT8_RECIPE_WITH_BEST_SETTINGS=rowwise ./benchmarks/float8/training/llama3.sh
#
# Environment (llama3.py says more): FLOAT8_RECIPE_WITH_BEST_SETTINGS=tensorwise|rowwise|rowwise_with_gw_hp, NGPU,
# FLAVOR (8B), N_LAYERS, SEQ_LEN (8192), LOCAL_BATCH_SIZE (1), ACCUMULATION (1), STEPS (40), WARMUP_STEPS (10), AC (op),
# VARIANTS ("bf16" and the recipe), EXTRA_ARGS, PEER=1, PEER_EXTRA_ARGS, TIMEOUT, OUT, DRY_RUN=1.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)
source "$root/.ci/environment.sh"
use_environment "torch tyro tomli" "$root"
exec "$python" "$root/benchmarks/float8/training/llama3.py" "$@"
