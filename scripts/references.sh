#!/usr/bin/env bash
# Makes the reference fixtures again in .venv-references and compares them with the committed ones.
# Usage: scripts/references.sh [--write] [--only PART …]; --write replaces the committed ones.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv-references/bin/python

stamp=$({ pwd; cat requirements/references*.txt; } | sha256sum | cut -d' ' -f1)
if [[ ! -f .venv-references/.installed || $(<.venv-references/.installed) != "$stamp" ]]; then
  scripts/bootstrap.sh runtime
  echo "==> Installing PyTorch and transformers into .venv-references (a few minutes)" >&2
  rm -rf .venv-references
  .venv/bin/python -m venv --without-pip .venv-references
  pip=(.venv/bin/python -m pip --python "$python" install --quiet --disable-pip-version-check)
  "${pip[@]}" -r requirements/references.txt
  "${pip[@]}" --no-deps -r requirements/references-alone.txt
  echo "$stamp" >.venv-references/.installed
fi

check=--check
if [[ ${1:-} == --write ]]; then
  check=
  shift
fi
exec "$python" tests/references/make.py $check "$@"
