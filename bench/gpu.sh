#!/usr/bin/env bash
# All that needs a GPU, in less than 9 minutes: `bench/gpu.sh DIR` writes correctness.json, kernels.json and denoisers.json.
# It runs from a checkout: torch and triton have to be installed, this package need not be. PYTHON names the interpreter.
# Ends with 1 where a result is wrong or a row has failed; what was measured is in DIR all the same.
set -u

if [ $# -ne 1 ]; then
    echo "usage: bench/gpu.sh DIR" >&2
    exit 2
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
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

status=0
# Each part begins no row after so many seconds of the whole; the time limit is there for a row that hangs.
part() {
    local left=$(($2 - SECONDS))
    timeout --kill-after=5 $((left + 25)) "$python" "$root/bench/gpu/$1.py" "$out" --seconds $left || status=1
}
part correctness 180
part speed 390
part denoisers 500
exit $status
