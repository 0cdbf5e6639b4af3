#!/bin/sh
# tools/test_versions.sh VERSION...
#
# Runs the tests that depend on the Python version (marker `versions`) with every other interpreter that this machine has.
# One that is missing, or cannot build fastq, is named and passed over.
set -eu
cd "$(dirname "$0")/.."
main=$(.venv/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])')

find_version() {
    for name in "python$1" "$HOME"/.pyenv/versions/"$1".*/bin/python "/opt/homebrew/bin/python$1"; do
        if "$name" -c '' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
}

for version in "$@"; do
    [ "$version" != "$main" ] || continue
    python=$(find_version "$version")
    if [ -z "$python" ]; then
        echo "-- Python $version: not on this machine"
        continue
    fi
    status=0
    PYTHON=$python sh tools/venv.sh ".venv-$version" test || status=$?
    if [ "$status" = 3 ]; then
        echo "-- Python $version: cannot build here"
        continue
    fi
    [ "$status" = 0 ] || exit "$status"
    echo "-- Python $version"
    ".venv-$version/bin/python" -m compileall -q fastq
    ".venv-$version/bin/python" -m pytest -q -m versions || status=$?
    [ "$status" = 0 ] || [ "$status" = 5 ] || exit "$status" # 5: no test carries the marker
done
