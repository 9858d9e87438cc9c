#!/usr/bin/env bash
# Installs the peers' Python packages (PyTorch, transformers, PEFT; about 6 GB) into .peers/venv, which git ignores.
# An environment that exists already is named by LORA_DA_PEER_PYTHON instead. PYTHON: the interpreter to make it from.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .peers/venv/bin/python ] || "${PYTHON:-python3}" -m venv .peers/venv
.peers/venv/bin/pip install --quiet --disable-pip-version-check -r benchmarks/requirements.txt
echo "$PWD/.peers/venv/bin/python"
