#!/bin/sh
# Usage: install.sh VENV [DEPENDENCY_GROUP ...]
# Makes the virtual environment VENV if it is not there and installs the project into it, editable, with the named
# dependency groups of pyproject.toml. What is up to date already stays as it is.
set -eu
cd "$(dirname "$0")/.."
venv=$1
shift

suits() {
    "$1" -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null
}

if ! suits "$venv/bin/python"; then
    for python in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        suits "$python" && break
        python=
    done
    if [ -z "$python" ]; then
        echo "No Python 3.11 to 3.13 with its venv module: looked for ${PYTHON:-python3, python3.13, python3.12, python3.11}." >&2
        echo "Install one, or name it: make PYTHON=/path/to/python3.12 ..." >&2
        exit 1
    fi
    "$python" -m venv --clear "$venv"
fi
pip() {
    "$venv/bin/python" -m pip --disable-pip-version-check "$@"
}

# --group came with pip 25.1.
pip install --quiet --upgrade 'pip>=25.1'

gpus=$(sh scripts/count_gpus.sh)
if ! "$venv/bin/python" -c 'import torch' 2>/dev/null; then
    if [ -z "${TORCH_INDEX:-}" ] && [ "$gpus" -eq 0 ] && [ "$(uname -s)" = Linux ]; then
        echo "No GPU here. If pip brings torch with CUDA, TORCH_INDEX=<PyTorch's CPU index> saves the larger download."
    fi
    # torch alone from its own index: the project's other dependencies do not all lie there.
    torch=$("$venv/bin/python" -c 'import tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
print(next(name for name in project["dependencies"] if name.startswith("torch>")))')
    pip install --progress-bar off ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$torch"
fi

groups=
for group in "$@"; do groups="$groups --group $group"; done
# shellcheck disable=SC2086  # one word per group
pip install --quiet --progress-bar off --editable . $groups

if [ "$gpus" -gt 0 ] && ! "$venv/bin/python" -c 'import sys, torch; sys.exit(torch.version.cuda is None)'; then
    echo "This machine has $gpus GPU(s), but the torch that was installed is a build without CUDA." >&2
    echo "Everything will run on the CPU. To change that: make clean, then give TORCH_INDEX." >&2
fi
