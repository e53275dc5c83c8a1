# shellcheck shell=bash
# Sourced by tests/run.sh and examples/quickstart/run.sh: one virtual environment, set up once.
#
#   source tools/venv.sh; ensure_venv ROOT      afterwards $VENV_PYTHON is ROOT/.venv/bin/python
#
# A stamp with the hash of what was installed from makes the second call free; it is written last, so an
# interrupted set-up is repeated. Environment: PYTHON (interpreter to start from, default python3),
# V2PE_TORCH_CONSTRAINTS (a constraints file instead of constraints/cpu.txt or constraints/gpu.txt), V2PE_EXTRAS (extras of
# pyproject.toml beside test and dev; default: gpu where there is an NVIDIA GPU, none elsewhere).

_venv_say() { echo "[venv] $*" >&2; }

_venv_constraints() { # ROOT -> path of the constraints file on stdout
    if [ -n "${V2PE_TORCH_CONSTRAINTS:-}" ]; then
        echo "$V2PE_TORCH_CONSTRAINTS"
    elif command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then
        echo "$1/constraints/gpu.txt"
    else
        echo "$1/constraints/cpu.txt"
    fi
}

_venv_extras() { # CONSTRAINTS -> list of extras on stdout
    local more="${V2PE_EXTRAS-}"
    if [ -z "${V2PE_EXTRAS+set}" ] && [ "${1##*/}" = gpu.txt ]; then more=gpu; fi
    echo "test,dev${more:+,$more}"
}

_venv_check_python() { # INTERPRETER
    if ! command -v "$1" >/dev/null 2>&1; then
        _venv_say "no '$1' on the PATH; install Python 3.10 or newer, or set PYTHON=/path/to/python3"
        return 1
    fi
    if ! "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        _venv_say "$("$1" --version 2>&1) is too old, Python 3.10 or newer is needed; set PYTHON=/path/to/python3"
        return 1
    fi
}

_venv_stamp() { # ROOT CONSTRAINTS EXTRAS -> hash on stdout; the path counts, because the install is editable
    "$VENV_PYTHON" - "$1" "$3" "$1/pyproject.toml" "$1/setup.py" "$2" <<'PY'
import hashlib, pathlib, sys
digest = hashlib.sha256("|".join([sys.version, *sys.argv[1:3]]).encode())
for name in sys.argv[3:]:
    digest.update(pathlib.Path(name).read_bytes())
print(digest.hexdigest())
PY
}

_venv_explain_pip() { # CONSTRAINTS
    _venv_say "pip could not install the packages; its own message is above."
    if grep -qs '^torch==.*+cpu' "$1"; then
        _venv_say "$1 asks for the CPU build of torch, so that no CUDA build of several GB is downloaded."
        _venv_say "If pip did not find it, the configured package index does not carry CPU builds. Ways out:"
        _venv_say "  PIP_EXTRA_INDEX_URL=<PyTorch's index of CPU wheels> and run this command again, or"
        _venv_say "  V2PE_TORCH_CONSTRAINTS=FILE with a line such as 'torch==2.13.0' to take what your index has."
    fi
}

_venv_create() { # ROOT: make .venv unless a working one is there
    if "$VENV_PYTHON" -c '' 2>/dev/null; then
        return 0
    fi
    local base="${PYTHON:-python3}"
    _venv_check_python "$base" || return 1
    _venv_say "creating $1/.venv with $("$base" --version 2>&1)"
    if ! "$base" -m venv --clear "$1/.venv"; then
        _venv_say "'$base -m venv' failed; on Debian and Ubuntu it is the package python3-venv"
        return 1
    fi
}

ensure_venv() { # ROOT
    local root="$1" constraints extras stamp_file="$1/.venv/megatron_v2pe.stamp" stamp
    VENV_PYTHON="$root/.venv/bin/python"
    constraints="$(_venv_constraints "$root")"
    if [ ! -r "$constraints" ]; then
        _venv_say "constraints file '$constraints' cannot be read (V2PE_TORCH_CONSTRAINTS names a file)"
        return 1
    fi
    _venv_create "$root" || return 1
    extras="$(_venv_extras "$constraints")"
    stamp="$(_venv_stamp "$root" "$constraints" "$extras")" || return 1
    if [ "$(cat "$stamp_file" 2>/dev/null)" = "$stamp" ]; then
        _venv_say "$root/.venv is up to date"
        return 0
    fi
    _venv_say "installing megatron_v2pe[$extras] into $root/.venv, torch from $constraints"
    if ! "$VENV_PYTHON" -m pip install --disable-pip-version-check -c "$constraints" -e "${root}[$extras]"; then
        _venv_explain_pip "$constraints"
        return 1
    fi
    echo "$stamp" >"$stamp_file"
}
