#!/usr/bin/env bash
# Both stages, within TOTAL seconds: bash run.sh. Ends with 1 where anything failed; see common.sh
# for what may be set. What the first stage leaves of the time is the second's.
here=$(dirname "${BASH_SOURCE[0]}")
total=${TOTAL:-575}
PYTEST_S=${PYTEST_S:-110} PROFILE_S=${PROFILE_S:-45} bash "$here/stage1.sh"
one=$?
left=$((total - SECONDS))
BUDGET=${BUDGET:-$((left < 400 ? left : 400))} bash "$here/stage2.sh"
two=$?
[ $one -eq 0 ] && [ $two -eq 0 ]
