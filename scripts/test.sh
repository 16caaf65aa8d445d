#!/usr/bin/env bash
# Runs the test suite: scripts/test.sh PYTHON [ARGUMENTS OF PYTEST]
#
# In two parts. Tests that look at optimized programs compile them as users do, which hides what the
# checks of annotations cost. All others look at results only: XLA need not optimize for them, and
# their calls are not checked.
set -u
cd "$(dirname "$0")/.."
python=$1
shift

# A run starts some sixty processes. Without the bytecode of the first, each would compile jserve anew.
unset PYTHONDONTWRITEBYTECODE

no_tests=5  # pytest's exit status; one part may have none of the tests that were asked for
"$python" -m pytest "$@" --optimized
first=$?
"$python" -m pytest "$@" --unoptimized --jaxtyping-packages=
second=$?
[ $first -eq $no_tests ] && exit $second
[ $second -eq $no_tests ] && exit $first
exit $((first > second ? first : second))
