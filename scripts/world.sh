#!/usr/bin/env bash
# Runs official clients against one server: scripts/world.sh PYTHON [ARGUMENTS OF PYTEST]
#
# PYTHON has jserve. Every requirements/clients-<group>.txt gets an environment without jserve,
# .venv-clients-<group>, in which pytest runs tests/world/<group>.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1
shift

for lock in requirements/clients-*.txt; do
  venv=.venv-$(basename "$lock" .txt)
  stamp=$({ pwd; cat "$lock"; } | sha256sum | cut -d' ' -f1)
  if [[ -f $venv/.installed && $(<"$venv/.installed") == "$stamp" ]]; then continue; fi
  echo "==> Installing $lock into $venv (a minute)" >&2
  rm -rf "$venv"
  "$python" -m venv --without-pip "$venv"
  "$python" -m pip --python "$venv/bin/python" install --quiet --disable-pip-version-check \
    --require-hashes --no-deps -r "$lock"
  echo "$stamp" >"$venv/.installed"
done
exec "$python" -m tests.world "$@"
