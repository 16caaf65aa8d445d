#!/usr/bin/env bash
# Makes .venv (or FOLDER) and installs requirements/<lock>.txt into it, every file checked by hash.
# Usage: scripts/bootstrap.sh runtime|dev|cuda|tpu|newest [FOLDER]. PYTHON=… chooses the interpreter.
# `newest` uses no lock: it installs what `pip install` finds today, with what the tests need.
# A stamp makes the second call instant. Needs neither root nor ensurepip.
set -euo pipefail
cd "$(dirname "$0")/.."

lock=${1:?usage: scripts/bootstrap.sh runtime|dev|cuda|tpu|newest [FOLDER]}
venv=${2:-.venv}
lock_file=requirements/$lock.txt
venv_python=$venv/bin/python
log=.cache/bootstrap.log

say() { printf '==> %s\n' "$*" >&2; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

# The folder is part of it: a virtual environment does not survive being moved.
# `newest` holds for one day and one interpreter.
stamp_of() {
  {
    pwd
    cat pyproject.toml
    if [[ $1 == newest ]]; then
      date +%F
      "$newest_python" -c 'import sys; print(sys.executable, sys.version)'
    else
      cat "requirements/$1.txt"
    fi
  } | sha256sum | cut -d' ' -f1
}
is_installed() {
  [[ -x $venv_python && -f $venv/.installed-$1 && $(<"$venv/.installed-$1") == "$(stamp_of "$1")" ]]
}

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.11 python3.12 python3.13 python}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  die "no Python 3.11 or newer found (tried: ${PYTHON:-python3 python3.11 python3.12 python3.13 python})." \
    "Install one (Debian, Ubuntu: apt install python3) or name it: make PYTHON=/path/to/python3.11 …"
}

# Sets `pip` to a command that installs into it, without ensurepip where it is missing.
make_venv() {
  local python wheel
  python=$(find_python)
  if ! "$venv_python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    say "Making $venv with $("$python" --version)"
    rm -rf "$venv"
    "$python" -m venv --without-pip "$venv" >"$log" 2>&1 || {
      cat "$log" >&2
      die "$python cannot make virtual environments. Debian, Ubuntu: apt install python3-venv"
    }
  fi
  if ! "$venv_python" -m pip --version >/dev/null 2>&1; then
    "$venv_python" -m ensurepip >"$log" 2>&1 || true
  fi
  if "$venv_python" -m pip --version >/dev/null 2>&1; then
    pip=("$venv_python" -m pip)
    return
  fi
  if "$python" -m pip --python "$venv_python" --version >/dev/null 2>&1; then
    pip=("$python" -m pip --python "$venv_python")
    return
  fi
  for wheel in /usr/share/python-wheels/pip-*.whl; do
    if [[ -f $wheel ]]; then
      pip=("$venv_python" "$wheel/pip")
      return
    fi
  done
  die "$python has neither ensurepip nor pip. Debian, Ubuntu: apt install python3-venv (or python3-pip)"
}

# Runs pip with one plain line per package that it fetches; the whole output is in the log.
install_lock() {
  local total
  total=$(grep -c '^[A-Za-z0-9]' "$lock_file")
  say "Installing $total packages from $lock_file (a few minutes the first time; log: $log)"
  "${pip[@]}" install --require-hashes --no-deps --disable-pip-version-check --progress-bar off \
    -r "$lock_file" 2>&1 | tee "$log" | awk -v total="$total" '
      /^(Collecting|Processing|Ignoring|Requirement already satisfied:) / { n++ }
      /^(Collecting|Processing) / {
        name = $2; sub(".*/", "", name); printf "    [%d/%d] %s\n", n, total, name; fflush()
      }
      /^Installing collected/ { print "    unpacking …"; fflush() }
    ' >&2 || { tail -n 20 "$log" >&2; die "installation failed; the whole log is in $log"; }
  "$venv_python" -m pip install --quiet --no-deps --no-build-isolation --disable-pip-version-check \
    --editable . >>"$log" 2>&1 || { tail -n 20 "$log" >&2; die "could not install jserve itself"; }
}

# Makes the folder anew and resolves pyproject.toml as a user's pip does, with what the tests need.
install_newest() {
  rm -rf "$venv"
  make_venv
  say "Installing the newest packages that pyproject.toml allows (a few minutes; log: $log)"
  "${pip[@]}" install --disable-pip-version-check --progress-bar off --editable '.[test]' \
    >"$log" 2>&1 || { tail -n 20 "$log" >&2; die "installation failed; the whole log is in $log"; }
  "${pip[@]}" freeze --exclude-editable >"$venv/.installed-versions"
}

# The CPU kernels in C++ are optional: without a compiler XLA's own code serves, slower.
native=jserve/pallas_kernels/native
kernel_log=.cache/kernels.log
kernel_stamp() {
  {
    pwd
    cat "$native"/*.cc "$native"/*.h "$native"/build.py "$venv"/.installed-*
    grep -m1 -E '^(flags|Features)' /proc/cpuinfo 2>/dev/null || true
    c++ --version 2>/dev/null || true
  } | sha256sum
}

# $venv/.kernels holds the stamp of the last attempt and the library that it made, if any.
build_kernels() {
  local stamp built
  stamp=$(kernel_stamp)
  if [[ -f $venv/.kernels && $(head -n 1 "$venv/.kernels") == "$stamp" ]]; then
    built=$(tail -n +2 "$venv/.kernels")
    if [[ -z $built || -f $built ]]; then return; fi
  fi
  if ! command -v c++ g++ clang++ >/dev/null; then
    say "No C++ compiler: XLA's own code will serve on CPU (Debian, Ubuntu: apt install g++)"
    return
  fi
  say "Building the native CPU kernels (some ten seconds)"
  if ! built=$("$venv_python" -m jserve.pallas_kernels.native.build 2>"$kernel_log"); then
    say "They could not be built, so XLA's own code will serve on CPU; the compiler's words: $kernel_log"
    built=
  fi
  printf '%s\n%s\n' "$stamp" "$built" >"$venv/.kernels"
}

# dev is a superset of runtime, so either satisfies a call for runtime.
wanted_is_installed() { is_installed "$lock" || { [[ $lock == runtime ]] && is_installed dev; }; }

[[ $lock == newest || -f $lock_file ]] || die "no such lock: $lock_file"
if [[ $lock == newest ]]; then newest_python=$(find_python); fi
mkdir -p .cache
exec 9>.cache/bootstrap.lock
if command -v flock >/dev/null; then flock 9; fi
if ! wanted_is_installed; then
  if [[ $lock == newest ]]; then
    install_newest
  else
    make_venv
    install_lock
  fi
  stamp_of "$lock" >"$venv/.installed-$lock"
  say "Installed."
fi
if [[ $lock == newest ]]; then
  say "$("$venv_python" --version), $(grep -E '^(jax|jaxlib|flax|numpy)==' "$venv/.installed-versions" | xargs)"
fi
build_kernels
