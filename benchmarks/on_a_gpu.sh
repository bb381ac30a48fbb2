#!/bin/sh
# Run all tests and benchmarks that need a GPU, the most important first:
#     IMVIA_DATA=… benchmarks/on_a_gpu.sh FOLDER
# Results and output are written to FOLDER. If a part fails, its status is printed and the next part runs.
set -u
out=${1:?give a folder for the results}
here=$(dirname "$0")
mkdir -p "$out"

measure() { # NAME COMMAND...
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
