#!/usr/bin/env bash
# Does it work here: environment, the GPU tests, kernels of two workloads. Each part has a limit of
# its own, together 260 s; PYTEST_S and PROFILE_S change them, WORKLOADS what is profiled.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
failed=0

{
    date
    cat "$HERE/manifest.json"
    nvidia-smi
    nproc
    df -h /tmp "$SHM"
    "$PY" -m pip list 2> /dev/null | grep -iE "^(torch|triton|numpy|pydantic|pytest|typing)"
    timeout 75 "$PY" -P - << 'PYTHON'
import time
started = time.time()
import torch, cgo, cgo.runtime.training
print(f"imports {time.time() - started:.1f} s; torch {torch.__version__}; cgo from {cgo.__file__}")
if torch.cuda.is_available():
    torch.cuda.init()
    print(f"with CUDA {time.time() - started:.1f} s;", torch.cuda.get_device_name(0))
    print("free, total", torch.cuda.mem_get_info(), "cuDNN", torch.backends.cudnn.version())
PYTHON
} > "$OUT/env.txt" 2>&1
code=$?
took "environment" $code
[ $code -eq 0 ] || { tail -5 "$OUT/env.txt"; exit 1; }

# An interrupt lets pytest still say what it has found.
cores=$(nproc)
PYTHONSAFEPATH=1 timeout -s INT -k 10 "${PYTEST_S:-110}" "$PY" -m pytest -p no:cacheprovider -q \
    -m gpu -n $((cores < 8 ? cores : 8)) --dist load --timeout 80 --tb=short -rfEs \
    $(cat gpu_tests.txt) > "$OUT/pytest.txt" 2>&1
code=$?
took "GPU tests" $code
[ $code -eq 0 ] || failed=1
tail -25 "$OUT/pytest.txt"

timeout -k 5 "${PROFILE_S:-60}" "$PY" benchmarks/gpu_profile.py --device "$DEVICE" --size "$SIZE" \
    --plans "$HERE/plans" --out "$OUT/profile.txt" ${WORKLOADS:-cnn heads} 2>&1 | tail -5
code=${PIPESTATUS[0]}
took "profiles" $code
[ $code -eq 0 ] || failed=1
grep -E "^(==|step|  first)" "$OUT/profile.txt"
exit $failed
