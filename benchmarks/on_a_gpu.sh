#!/bin/sh
# All that is to be measured and tested on a GPU, what matters most first:
#     IMVIA_DATA=… benchmarks/on_a_gpu.sh FOLDER
# writes what was found to FOLDER. A part that fails is told of and does not end the others.
set -u
out=${1:?a folder to write to}
here=$(dirname "$0")
mkdir -p "$out"

measure() { # a name, and what to run
    name=$1
    shift
    echo "== $name"
    start=$(date +%s)
    "$@" >"$out/$name.txt" 2>&1 || echo "$name ended with status $?"
    tail -n 40 "$out/$name.txt"
    echo "== $name: $(($(date +%s) - start)) s"
}

measure streams python -m pytest -q -p no:cacheprovider "$here/../tests/test_streams.py"
measure training python "$here/training.py" --data DB15K --device cuda --epochs 5 \
    --skip PyKEEN --out "$out/training.json"
measure kernels python -m pytest -q -p no:cacheprovider \
    "$here/../tests/test_gpu_kernels.py" "$here/../tests/test_fused_triton.py"
measure profile python "$here/profile_step.py" --data DB15K --device cuda
measure ranking python "$here/ranking.py" --data DB15K --device cuda --every-head-only \
    --out "$out/ranking.json"
measure aggregation python "$here/aggregation.py" --device cuda --large-only \
    --out "$out/aggregation.json"
