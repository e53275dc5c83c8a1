#!/usr/bin/env bash
# Transformer Engine's Python sources for the tests marked te:   bash tests/te/install.sh
#
# Puts the wheel transformer_engine 2.11.0 (Python only, 0.7 MB) without its dependencies into .te-python, a folder that
# only those tests look into: no torch, no CUDA, nothing compiled. What the sources import beyond torch is made up by
# tests/te/engine.py. A stamp, written last, makes the second call free.
set -u
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
python="${VENV_PYTHON:-$root/.venv/bin/python}"
target="$root/.te-python"
package="transformer_engine==2.11.0"

say() { echo "[te] $*" >&2; }

if [ "$(cat "$target/stamp" 2>/dev/null)" = "$package" ]; then
    exit 0
fi
say "installing $package without dependencies into $target"
rm -rf "$target" "$target.new"
if ! "$python" -m pip install --disable-pip-version-check --quiet --no-deps --no-compile --only-binary :all: \
    --target "$target.new" "$package"; then
    say "pip could not install $package; its own message is above. The other tests do not need it:"
    say "  $python -m pytest -m 'not te and not slow and not gpu'"
    exit 1
fi
echo "$package" >"$target.new/stamp"
mv "$target.new" "$target"
say "done: $(du -sh "$target" | cut -f1)"
