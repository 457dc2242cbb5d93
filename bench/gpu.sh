#!/bin/sh
# The GPU benchmarks, part by part: sh bench/gpu.sh PART... (bench/README.md says what each takes).
# PY: the interpreter; OUT: where records go, else bench/results; MMADAPT_COMMIT where there is no git.
# A part that fails does not keep the next from running; the exit status tells.
cd "$(dirname "$0")/.." || exit 2
: "${PY:=python}"
out=${OUT:+--out "$OUT"}
failed=""

bench() {
    begin=$(date +%s)
    # shellcheck disable=SC2086
    "$PY" -m "$@" $out
    code=$?
    echo "== $*: exit $code after $(($(date +%s) - begin)) s"
    [ "$code" -eq 0 ] || failed="$failed
  exit $code: $*"
}

part() {
    case $1 in
        step) bench bench.step ;;
        blocks)
            bench bench.run block --rounds 12
            bench bench.run vit_block --rounds 12 ;;
        blocks-eager)
            bench bench.run block vit_block --no-compile --mode eager-call --rounds 8 ;;
        micro)
            bench bench.run adapter routed gate cp_linear --grid subset --no-compile --budget-s 200 ;;
        compiled)
            bench bench.run adapter routed --shapes 8192x4096x32 --variants norm,norm-shared \
                --rounds 20 --providers eager,where,manual,compile,triton,cuda ;;
        autotuned)
            bench bench.run adapter routed --shapes 8192x4096x32 --variants norm --rounds 20 \
                --providers eager,where,compile-max,triton,cuda ;;
        backward)
            bench bench.run adapter routed cp_linear --grid subset --no-compile --passes backward \
                --budget-s 240 ;;
        routing)
            bench bench.run routed --shapes 8192x4096x32 --no-compile --rounds 20 --budget-s 300 \
                --variants norm-image0,norm-image10,norm-image50,norm-image90,norm-image100,norm-image50-run1,norm-image50-run576,norm-image50-run2880,norm-E1,norm-E4-image50,norm-shared ;;
        heat)
            bench bench.run adapter --grid heat --variants plain --no-compile --rounds 12 \
                --no-launches --providers eager-packed,manual,triton,cuda --budget-s 400 ;;
        tokens)
            bench bench.run routed gate cp_linear --grid tokens --no-compile --rounds 15 \
                --no-launches --budget-s 300 ;;
        overhead) bench bench.overhead --contracts adapter,routed ;;
        overhead-all) bench bench.overhead ;;
        growth) bench bench.growth ;;
        goals) bench bench.run goals ;;
        subset) for each in step blocks micro overhead; do part "$each"; done ;;
        all)
            for each in goals step blocks blocks-eager micro compiled backward routing heat tokens \
                overhead-all growth; do part "$each"; done ;;
        *)
            echo "$1: no such part; see bench/README.md" >&2
            failed="$failed
  no such part: $1" ;;
    esac
}

[ $# -gt 0 ] || set -- subset
for name in "$@"; do part "$name"; done
if [ -n "$failed" ]; then
    echo "failed:$failed"
    exit 1
fi
