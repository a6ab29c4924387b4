# Read by the stages: where things are, and the environment that the wheels are installed into.
#   PY       a Python that has torch with CUDA (python3)
#   OUT      the folder of results (./gpu-results)
#   DEVICE, SIZE   cuda and full; cpu and reduced show that the bundle runs
#   SHM      where caches and temporary files go (/dev/shm)
set -u
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PY=${PY:-python3} OUT=${OUT:-$PWD/gpu-results} DEVICE=${DEVICE:-cuda} SIZE=${SIZE:-full}
[ -w /dev/shm ] && SHM=${SHM:-/dev/shm} || SHM=${SHM:-/tmp}
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) || exit 9

# Named by its content, so that a bundle that was mended is installed anew.
SITE=${SITE:-$SHM/cgo-site-$(cat "$HERE"/wheels/*.whl | sha256sum | cut -c 1-12)}
if [ ! -d "$SITE" ]; then
    "$PY" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$SITE.part" \
        "$HERE"/wheels/*.whl && mv "$SITE.part" "$SITE" || { echo "the wheels cannot be installed" >&2; exit 9; }
fi

export PYTHONPATH=$SITE PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1 OMP_NUM_THREADS=1
export TMPDIR=$SHM/cgo-temporary CGO_CACHE=$SHM/cgo-costs CUDA_MODULE_LOADING=LAZY
export TORCHINDUCTOR_CACHE_DIR=$SHM/cgo-inductor TRITON_CACHE_DIR=$SHM/cgo-triton
mkdir -p "$TMPDIR" "$CGO_CACHE"
cd "$HERE/suite" || exit 9

# A line on what a part took; all of them are in one file.
took() { echo "$1: $((SECONDS - since)) s, ended with $2" | tee -a "$OUT/times.txt"; since=$SECONDS; }
since=$SECONDS
