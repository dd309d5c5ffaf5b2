#!/bin/sh
# One run on a machine with a GPU, of less than ten minutes. It has not been on one: its parts were run against the fake driver alone.
#
#   tests/gpu/lease.sh prepare   on this machine: compiles all that is needed into .lease, which git ignores (carry it along)
#   tests/gpu/lease.sh           on the other: checks and measures, and writes $OUT/lease.json and $OUT/kernels.lock; needs Python with torch, numpy and
#                                jinja2. --quick: few of each
set -eu
cd "$(dirname "$0")/../.."
folder=.lease

if [ "${1:-}" = prepare ]; then
  .venv/bin/python tests/gpu/lease.py prepare "$folder"
  cp build/release/libtsengine.so "$folder"
  rm -r "$folder/checkpoint"
  du -sh "$folder"
  exit
fi

out=${OUT:-.}
python=${PYTHON:-python3}
status=0
timeout 420 "$python" tests/gpu/lease.py run "$@" "$folder" "$out/lease.json" || status=$?
if command -v compute-sanitizer >/dev/null; then
  timeout 120 compute-sanitizer --tool memcheck --error-exitcode 2 \
    "$python" tests/gpu/lease.py run --quick "$folder" "$out/sanitized.json" >"$out/sanitizer.log" 2>&1 || status=$?
else
  echo "no compute-sanitizer on this machine: that part is left out"
fi
exit "$status"
