#!/usr/bin/env bash
# Sets up .venv: `tools/setup.sh core` installs the requirements of `imvia-graph fit`, `tools/setup.sh full` every extra.
# Called by the Makefile; can be run again at any time.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

mode=${1:-full}
venv=.venv
log=$venv/setup.log
unfinished=$venv/.unfinished # exists while pip runs; left behind if pip was killed
sources=(setup.py pyproject.toml constraints.txt tools/setup.sh)
extras=rdf,clip,encoders,hdf5,report,explore,tune,tensorboard,pictures,countries,browser,test,docs,bench,dev # every extra but scatter, which needs torch to build

say() { printf '[setup] %s\n' "$*"; }
die() {
    printf '[setup] %s\n' "$*" >&2
    exit 1
}

suitable() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1; }

# Runs each candidate, since version managers put names on the PATH that refuse to run.
find_python() {
    local candidate version found
    if [ -n "${PYTHON:-}" ]; then
        version=$("$PYTHON" -c 'import platform; print(platform.python_version())' 2>/dev/null)
        found=${version:+is Python $version}
        suitable "$PYTHON" || die "PYTHON=$PYTHON ${found:-does not run}: name a Python 3.10, 3.11 or 3.12."
        python=$PYTHON
        return
    fi
    for candidate in python3 python3.12 python3.11 python3.10; do
        if suitable "$candidate"; then
            python=$candidate
            return
        fi
    done
    die "Found no Python 3.10, 3.11 or 3.12: install one, or name one with 'make PYTHON=/path/to/python ...'."
}

check_venv_module() {
    "$python" -c 'import ensurepip, venv' >/dev/null 2>&1 ||
        die "$python has no venv module: install it (Debian and Ubuntu: apt install python3-venv) and run make again."
}

# torch-scatter is compiled last, so check for its compiler and headers first.
check_compiler() {
    local compiler=${CXX:-c++} include
    echo '#include <vector>' | $compiler -x c++ -fsyntax-only - >/dev/null 2>&1 ||
        die "No C++ compiler ('$compiler') to build torch-scatter with: install one (Debian and Ubuntu: apt install g++) or name one with CXX=..., and run make again."
    include=$("$1" -c 'import sysconfig; print(sysconfig.get_path("include"))')
    echo '#include <Python.h>' | $compiler -x c++ -I"$include" -fsyntax-only - >/dev/null 2>&1 ||
        die "Python's headers, which torch-scatter is built with, are not in $include: install them (Debian and Ubuntu: apt install python3-dev) and run make again."
}

interrupted=
trap 'interrupted=yes' INT TERM HUP

# run COMMAND...: run a command, with its output in the log.
run() {
    local status
    touch "$unfinished"
    printf '\n$ %s\n' "$*" >>"$log"
    "$@" >>"$log" 2>&1
    status=$?
    if [ -n "$interrupted" ]; then
        die "Interrupted; run make again."
    fi
    # A killed pip may leave a package half installed; a failing one does not.
    [ $status -gt 128 ] || rm -f "$unfinished"
    return $status
}
# must COMMAND...: run a command; if it fails, print the end of the log and exit.
must() {
    run "$@" && return
    tail -n 25 "$log" >&2
    die "Failed: the lines above are the end of $PWD/$log."
}

pip=("$venv/bin/python" -m pip --disable-pip-version-check --no-input)

installed() { "$venv/bin/python" -c "from importlib.metadata import version; print(version('$1'))" 2>/dev/null; }

install_scatter() {
    local wanted stamp=$venv/.scatter build=()
    # A build works only with the version of torch that it was built with.
    wanted="torch-scatter $(sed -n 's/^torch-scatter==//p' constraints.txt), torch $(installed torch)"
    if [ -n "$(installed torch-scatter)" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        return
    fi
    say "building torch-scatter (about 4 minutes on two cores)"
    build=("${pip[@]}" install --no-build-isolation --no-cache-dir --no-deps --force-reinstall -c constraints.txt torch-scatter)
    if "$venv/bin/python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
        if run "${build[@]}"; then
            echo "$wanted" >"$stamp"
            return
        fi
        say "torch-scatter does not build for this GPU (see $log): building it for the CPU only"
    fi
    # Compile its files in parallel, which it does not do by default and cannot do for a GPU.
    printf '[build_ext]\nparallel = %s\n' "$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)" >$venv/parallel.cfg
    must env FORCE_ONLY_CPU=1 CFLAGS=-g0 DIST_EXTRA_CONFIG="$PWD/$venv/parallel.cfg" "${build[@]}"
    echo "$wanted" >"$stamp"
}

signature() { cat "${sources[@]}" | cksum; }

# The full set-up includes the core one: once installed, it is always updated as a whole.
[ -e $venv/.full ] && mode=full

if [ -e "$unfinished" ]; then
    say "the last set-up was interrupted: starting again with a new $venv"
    rm -rf $venv
elif [ -d $venv ] && ! suitable $venv/bin/python; then
    say "the Python of $venv does not run: starting again with a new $venv"
    rm -rf $venv
elif [ "$(cat $venv/.$mode 2>/dev/null)" = "$(signature)" ]; then
    touch $venv/.core $venv/.$mode # the sources are newer, but unchanged
    exit 0
fi

start=$SECONDS
if [ -d $venv ]; then
    [ "$mode" != full ] || check_compiler $venv/bin/python
    say "updating $venv"
else
    find_python
    check_venv_module
    [ "$mode" != full ] || check_compiler "$python"
    say "creating $venv with $("$python" --version)"
    mkdir -p $venv && touch "$unfinished"
    must "$python" -m venv $venv
fi

rm -f $venv/.core $venv/.full
must "${pip[@]}" install --upgrade -c constraints.txt pip setuptools wheel
if [ "$mode" = full ]; then
    say "installing torch, dgl and every extra (about 6 GB unpacked: some minutes)"
    must "${pip[@]}" install --no-build-isolation -c constraints.txt -e ".[$extras]"
    install_scatter
else
    say "installing torch, dgl and the other core requirements (about 6 GB unpacked: some minutes)"
    must "${pip[@]}" install --no-build-isolation -c constraints.txt -e .
fi

signature >$venv/.core
[ "$mode" != full ] || signature >$venv/.full
say "done in $((SECONDS - start)) s"
