#!/usr/bin/env bash
# Runs the tests with the other versions of DGL and torch that setup.py allows. `make test` uses DGL 2.1.0 with the
# newest torch; this script uses DGL 1.1.3 with the newest torch, and both versions of DGL with the oldest torch.
#
#   tools/compatibility.sh                      the quick tests that need no encoder
#   tools/compatibility.sh tests/test_nn.py -x  with arguments for pytest
#
# Needs `make setup` with Python 3.10 or 3.11 (DGL 1.1.3 has no wheels for 3.12), and 6 GB for the oldest torch.
# VENV names an environment other than .venv, COMPATIBILITY a folder other than .compatibility to install into.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

newest=$(realpath "${VENV:-.venv}")
folder=$(realpath -m "${COMPATIBILITY:-.compatibility}")
torch=2.4.0
old=1.1.3
oldest=$folder/torch-$torch
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

arguments=("$@")
if [ $# -eq 0 ]; then
    # Tests of encoders, compilers and a browser do not depend on DGL.
    arguments=(tests -m "not slow" -p no:cacheprovider)
    for name in encode own_kg packaging pictures explore docs; do
        arguments+=("--ignore=tests/test_$name.py")
    done
fi

say() { printf '\n[compatibility] %s\n' "$*"; }

mkdir -p "$folder"
# Pin all but the packages under test and those that must match the version of torch.
grep -vE '^(torch|dgl|torchdata|torchvision|timm|open_clip_torch|pykeen)[=_]' constraints.txt >"$folder/constraints.txt"

install_oldest() {
    [ -x "$oldest/bin/python" ] || "$newest/bin/python" -m venv "$oldest" || return
    "$oldest/bin/pip" install -q --upgrade -c "$folder/constraints.txt" pip setuptools wheel &&
        "$oldest/bin/pip" install -q --no-build-isolation -c "$folder/constraints.txt" \
            "torch==$torch" "dgl==2.1.0" -e ".[test,rdf,hdf5]" pillow pyarrow
}

# Installs DGL alone; PYTHONPATH puts it before the DGL of an environment.
install_old_dgl() {
    [ -d "$folder/dgl-$old/dgl" ] ||
        "$newest/bin/pip" install -q --no-deps --target "$folder/dgl-$old" "dgl==$old"
}

failed=0
# run_tests NAME ENVIRONMENT [FOLDER OF DGL]
run_tests() {
    say "$1"
    PYTHONPATH=${3:-} "$2/bin/python" -c '
import imvia_graph, dgl, torch, sys
print("Python", sys.version.split()[0], "DGL", dgl.__version__, "torch", torch.__version__)' 2>/dev/null || { failed=1; return; }
    PYTHONPATH=${3:-} "$2/bin/python" -m pytest -q "${arguments[@]}" || failed=1
}

install_old_dgl || exit 1
run_tests "DGL $old, the newest torch" "$newest" "$folder/dgl-$old"
install_oldest || exit 1
run_tests "DGL 2.1.0, torch $torch" "$oldest"
run_tests "DGL $old, torch $torch" "$oldest" "$folder/dgl-$old"
exit $failed
