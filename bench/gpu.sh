#!/usr/bin/env bash
# All that needs a GPU, in less than 9 minutes: `bench/gpu.sh DIR` writes correctness.json, kernels.json, denoisers.json and
# pipelines.json; `bench/gpu.sh DIR SECONDS PART...` runs some of the parts, `tiles` among them, in another time.
# It runs from a checkout: torch and triton have to be installed, this package need not be. PYTHON names the interpreter.
# Ends with 1 where a result is wrong or a row has failed; what was measured is in DIR all the same.
set -u

if [ $# -lt 1 ]; then
    echo "usage: bench/gpu.sh DIR [SECONDS [PART...]]" >&2
    exit 2
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
seconds=${2:-500}
shift $(($# < 2 ? $# : 2))
[ $# -gt 0 ] || set -- correctness speed denoisers pipelines
python=${PYTHON:-python3}

# The package as it is installed: its four folders inside it, and a version, which is asked for when it is imported.
links=$(mktemp -d)
trap 'rm -rf "$links"' EXIT
mkdir "$links/diffpress" "$links/diffpress-0.dist-info"
ln -s "$root"/diffpress/* "$root/calibration" "$root/compress" "$root/export" "$root/kernels" "$links/diffpress"
printf 'Metadata-Version: 2.1\nName: diffpress\nVersion: 0\n' >"$links/diffpress-0.dist-info/METADATA"

# Our folder `kernels` must not answer for the distribution of that name, so the current folder stays off the path.
export PYTHONSAFEPATH=1
export PYTHONPATH="$links:$root/bench/gpu:$root/bench"
unset TRITON_INTERPRET DIFFPRESS_KERNELS DIFFPRESS_BENCH_DEADLINE

workers=$(($(nproc) / 2))
# Threads of many processes that wait for one another by spinning take the processors from those that work.
export OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=2
status=0
while [ $# -gt 0 ]; do
    # Each part begins no row after its share of what is left; the time limit is there for a row that hangs.
    share=$(((seconds - SECONDS) / $#))
    # What is timed has the GPU to itself.
    [ "$1" != pipelines ] || workers=1
    timeout --kill-after=5 $((share + 25)) "$python" "$root/bench/gpu/$1.py" "$out" --seconds $share --workers $workers || status=1
    shift
done
exit $status
