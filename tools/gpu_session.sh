#!/usr/bin/env bash
# Ten minutes on one GPU, without a network: what the project has to know from one.   bash tools/gpu_session.sh [FOLDER]
#
# Writes FOLDER/session.json, FOLDER/session.md (default: $OUT, or gpu_session) and, last, the output of the tests marked gpu.
# Every measurement catches its own errors, and what there is no time for is named. Environment: PYTHON; V2PE_SESSION_SECONDS
# (540 in all); V2PE_SESSION_ARGS (arguments of tools/gpu_session.py, such as --tokens 32768); V2PE_SESSION_TESTS=0 leaves
# the tests out. Nothing is installed: the Python needs torch, megatron-core and, for its rows, Transformer Engine.
set -u
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root" || exit 1
out="${1:-${OUT:-gpu_session}}"
seconds="${V2PE_SESSION_SECONDS:-540}"
python=""
for candidate in "${PYTHON:-}" "$root/.venv/bin/python" python3; do
    if [ -n "$candidate" ] && "$candidate" -c "import torch, megatron.core, omegaconf" >/dev/null 2>&1; then
        python="$candidate"
        break
    fi
done
if [ -z "$python" ]; then
    echo "[session] no Python here can import torch, megatron.core and omegaconf; set PYTHON" >&2
    exit 1
fi
mkdir -p "$out"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
started=$SECONDS
read -r -a more <<<"${V2PE_SESSION_ARGS:-}"
budget=$((seconds * 2 / 3))
timeout $((budget + 20)) "$python" tools/gpu_session.py --out "$out" --seconds "$budget" "${more[@]}"
code=$?
left=$((seconds - SECONDS + started))
if [ "${V2PE_SESSION_TESTS:-1}" = 1 ] && [ "$left" -gt 30 ]; then
    PYTHON="$python" timeout "$left" bash tests/run.sh -m gpu -q 2>&1 | tee "$out/tests.log" | tail -n 30
fi
exit "$code"
