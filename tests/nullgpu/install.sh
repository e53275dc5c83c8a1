#!/usr/bin/env bash
# A Python with a CUDA build of torch for the tests marked nullgpu, which need no GPU:   bash tests/nullgpu/install.sh
#
# Makes .venv-nullgpu (5 GB; torch 2.11 brings CUDA's libraries and headers). A stamp, written last, makes the second call
# free. Another Python that has these packages can be named by NULLGPU_PYTHON instead. Needs g++ as well.
set -u
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
target="$root/.venv-nullgpu"
packages=("torch==2.11.0" "megatron-core==0.16.1" numpy pillow safetensors sentencepiece tokenizers "omegaconf>=2.4,<2.5"
    tensorboard psutil tqdm fsspec pytest hypothesis)

say() { echo "[nullgpu] $*" >&2; }

if [ "$(cat "$target/stamp" 2>/dev/null)" = "${packages[*]}" ]; then
    exit 0
fi
say "installing ${packages[*]} into $target"
rm -rf "$target"
"${PYTHON:-python3}" -m venv "$target" || exit 1
if ! "$target/bin/python" -m pip install --disable-pip-version-check --quiet "${packages[@]}"; then
    say "pip could not install the packages; its own message is above"
    exit 1
fi
echo "${packages[*]}" >"$target/stamp"
