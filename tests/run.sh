#!/usr/bin/env bash
# Set up what is missing, then run the tests: bash tests/run.sh [any arguments of pytest]
# The whole suite is shared by two processes, file by file (WORKERS=4 for more).
# Paths among the arguments are as seen from the folder you call this from.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)

names_tests() {  # is ARGUMENT a path inside tests/?
    local path=${1%%::*}
    [ -e "$path" ] || return 1
    path=$(cd "$(dirname "$path")" && pwd -P)/$(basename "$path")/
    [ "${path#"$root/tests/"}" != "$path" ]
}

bash "$root/my_pipeline.sh" setup tests
all=(-n "${WORKERS:-2}" --dist loadfile "$root/tests")
for argument in "$@"; do
    if names_tests "$argument"; then all=(); fi
done
exec "$root/.venv/bin/python" -m pytest -q -c "$root/pyproject.toml" ${all[@]+"${all[@]}"} "$@"
