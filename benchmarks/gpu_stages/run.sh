#!/usr/bin/env bash
# Both stages, in ten minutes: bash run.sh. Ends with 1 where anything failed; see common.sh for
# what may be set.
here=$(dirname "${BASH_SOURCE[0]}")
PYTEST_S=${PYTEST_S:-110} PROFILE_S=${PROFILE_S:-45} bash "$here/stage1.sh"
one=$?
BUDGET=${BUDGET:-370} bash "$here/stage2.sh"
two=$?
[ $one -eq 0 ] && [ $two -eq 0 ]
