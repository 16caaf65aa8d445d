#!/usr/bin/env bash
# Runs the test suite: scripts/test.sh PYTHON [ARGUMENTS OF PYTEST]
#
# In two parts. Tests that look at optimized programs compile them as users do; all others look at
# results only, and XLA need not optimize for them, which takes most of its time. The checks of
# annotations take a third of the time that is left, so only the second part has them.
set -u
cd "$(dirname "$0")/.."
python=$1
shift

no_tests=5  # pytest's exit status; one part may have none of the tests that were asked for
"$python" -m pytest "$@" -m "optimized and not sweep" --jaxtyping-packages=
first=$?
"$python" -m pytest "$@" --unoptimized
second=$?
[ $first -eq $no_tests ] && exit $second
[ $second -eq $no_tests ] && exit $first
exit $((first > second ? first : second))
