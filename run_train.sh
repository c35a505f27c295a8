#!/usr/bin/env bash
# Train: CONFIG_FILE=./train_configs/debug_model.toml ./run_train.sh --training.steps=100
#
# The first use makes .venv and installs; an active environment that already imports torch, tyro and tomli is
# used as it is. Environment: NGPU, CONFIG_FILE, LOG_RANK, NNODES, ... (see trainer/launch.py), PYTHON (the
# interpreter that makes .venv).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$root/.ci/environment.sh"
use_environment "torch tyro tomli" "$root"

export CONFIG_FILE=${CONFIG_FILE:-$root/train_configs/debug_model.toml}
exec "$python" -m trainer.launch "$@"
