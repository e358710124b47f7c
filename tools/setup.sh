#!/usr/bin/env bash
# Make .venv with everything in requirements.txt. Usage: tools/setup.sh [python3]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}

# Before anything is created: what PyICU and pycld2 need to build, and the venv module itself.
missing_packages() {
    pkg-config --exists icu-i18n 2>/dev/null || echo libicu-dev
    command -v pkg-config >/dev/null || echo pkg-config
    command -v g++ >/dev/null || echo g++
    "$python" -c 'import ensurepip, venv' 2>/dev/null || echo python3-venv
    "$python" -c 'import os, sysconfig
raise SystemExit(not os.path.exists(sysconfig.get_paths()["include"] + "/Python.h"))' || echo python3-dev
}

command -v "$python" >/dev/null || { echo "error: $python: not found; install Python 3.11 or newer" >&2; exit 1; }
"$python" -c 'import sys; raise SystemExit(sys.version_info < (3, 11))' || {
    echo "error: $python is $("$python" --version); expected Python 3.11 or newer" >&2; exit 1; }

mapfile -t packages < <(missing_packages)
if ((${#packages[@]})); then
    install="apt-get update && apt-get install -y ${packages[*]}"
    if [[ $EUID -eq 0 ]] && command -v apt-get >/dev/null; then
        echo "+ $install"
        apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${packages[@]}"
    elif sudo -n true 2>/dev/null && command -v apt-get >/dev/null; then
        echo "+ sudo: $install"
        sudo apt-get update -qq && sudo DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${packages[@]}"
    else
        echo "error: missing from this system: ${packages[*]}. Nothing was changed. Install them first:" >&2
        echo "    sudo sh -c '$install'" >&2
        exit 1
    fi
fi

# A venv that was interrupted while it was made has a python and no pip.
.venv/bin/python -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear .venv
.venv/bin/python -m pip install --disable-pip-version-check -r requirements.txt
touch .venv/complete
