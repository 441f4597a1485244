#!/usr/bin/env bash
# Everything that needs a GPU, in one go and offline: builds, tests (20 steps of QLoRA on the Triton
# kernels among them, against peft's), then measures into
# benchmarks/results/<gpu>.json. PYTHON names an interpreter with torch, pybind11 and pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

"$python" setup.py -q build_ext --inplace
"$python" -m pytest -q -m gpu tests
PYTHONPATH=. "$python" benchmarks/gpu.py "$@"
PYTHONPATH=. "$python" benchmarks/bench_w4_gpu.py
PYTHONPATH=. "$python" benchmarks/bench_angular_gpu.py
PYTHONPATH=. "$python" benchmarks/bench_qlora_gpu.py
