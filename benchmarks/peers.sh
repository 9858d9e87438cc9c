#!/usr/bin/env bash
# Installs the peers into .peers, which git ignores: the Python packages (PyTorch, transformers, PEFT; about 6 GB) into .peers/venv,
# unless LORA_DA_PEER_PYTHON names an environment that has them, and the code of LoRA-DA's authors into .peers/LoRA-DA.
# PYTHON: the interpreter to make the environment from.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -z "${LORA_DA_PEER_PYTHON:-}" ]; then
  [ -x .peers/venv/bin/python ] || "${PYTHON:-python3}" -m venv .peers/venv
  .peers/venv/bin/pip install --quiet --disable-pip-version-check -r benchmarks/requirements.txt
  echo "$PWD/.peers/venv/bin/python"
fi
authors=.peers/LoRA-DA
[ -d $authors ] || git clone --quiet https://github.com/zqy0126/LoRA-DA $authors
git -C $authors checkout --quiet 928f484221395b657414b943d425402dc95505e8 # what the figures were taken with
