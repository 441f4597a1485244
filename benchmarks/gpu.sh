#!/usr/bin/env bash
# What needs a GPU, offline, in calls of at most ten minutes each:
#
#   gpu.sh tests     builds, then all GPU tests (compute-sanitizer over the kernels' where it is
#                    installed)
#   gpu.sh kernels   matmuls, angular distances and QLoRA steps into benchmarks/results/<gpu>*.json
#   gpu.sh tokens    tokens a second of whole models into benchmarks/results/<gpu>-tokens.json, .md
#
# Without a name all three follow each other. PYTHON names an interpreter with torch, pybind11 and
# pytest. What comes behind a name goes to its first program.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
LIMIT=600  # seconds of a call

measure() { PYTHONPATH=. "$python" "benchmarks/$1.py" "${@:2}"; }

run_tests() {
    "$python" setup.py -q build_ext --inplace
    "$python" -m pytest -q -m gpu tests "$@"
    if command -v compute-sanitizer >/dev/null; then
        compute-sanitizer --error-exitcode 1 \
            "$python" -m pytest -q -m gpu tests/gpu/test_cuda_gpu.py -k "every_spec or attention"
    fi
}

run_kernels() {
    measure gpu "$@"
    measure bench_w4_gpu
    measure bench_angular_gpu
    measure bench_qlora_gpu
}

run_tokens() { measure gpu_tokens "$@"; }

usage="usage: benchmarks/gpu.sh [tests|kernels|tokens] [options]"
case ${1:-all} in
    tests | kernels | tokens)
        if [[ -z ${GPU_SH_BOUNDED:-} ]]; then
            GPU_SH_BOUNDED=1 exec timeout --foreground "$LIMIT" benchmarks/gpu.sh "$@"
        fi
        "run_$1" "${@:2}"
        ;;
    all)
        status=0  # a failure hides no later measurement
        for name in tests kernels tokens; do benchmarks/gpu.sh "$name" || status=$?; done
        exit "$status"
        ;;
    -h | --help) sed -n '2,11s/^# \{0,1\}//p' benchmarks/gpu.sh ;;
    *)
        echo "$usage: found $1" >&2
        exit 2
        ;;
esac
