#!/usr/bin/env bash
# Set up .venv in this clone, with the command megatron-v2pe in it:   bash tools/setup.sh
#
# Needs Python 3.10 or newer, no root. Environment: PYTHON (interpreter to start from, default python3),
# V2PE_TORCH_CONSTRAINTS (a constraints file instead of constraints/cpu.txt or constraints/gpu.txt), V2PE_EXTRAS (extras of
# pyproject.toml beside test and dev, such as gpu,video; default: gpu where there is an NVIDIA GPU, none elsewhere).
# Idempotent. On a host without an NVIDIA GPU the CPU build of torch is installed, never a CUDA build.
set -eu
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=venv.sh
source "$root/tools/venv.sh"
ensure_venv "$root"
echo "now:  source $root/.venv/bin/activate" >&2
