#!/usr/bin/env bash
# What does it reach here: the suite, within BUDGET seconds. Its results are written figure by
# figure; the end of its log is a summary.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
budget=${BUDGET:-400}

# The limit is for a suite that hangs: it keeps to its budget itself.
timeout -k 10 $((budget + 20)) "$PY" benchmarks/gpu_suite.py --device "$DEVICE" --size "$SIZE" \
    --plans "$HERE/plans" --budget-s "$budget" --out "$OUT/gpu_suite.json" ${ARGUMENTS:-} \
    > "$OUT/suite.log" 2>&1
code=$?
took "suite" $code
tail -40 "$OUT/suite.log"
exit $code
