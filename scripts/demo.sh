#!/bin/sh
# The whole road on two CPU cores: simulate, train, sample, judge. Every command is printed, to be repeated by hand.
set -eu
out=${1:-runs/demo}
export OMP_NUM_THREADS=1 OPENAI_LOG_FORMAT=stdout,log,csv

run() { printf '\n$ %s\n' "$*"; "$@"; }

if command -v mpiexec >/dev/null 2>&1; then two="mpiexec -n 2"; else two=""; echo "no mpiexec: one process"; fi
rm -rf "$out"

run python scripts/simulate_microdoppler.py --out_dir "$out/data" --image_size 64
run $two python scripts/image_train_vae.py --config configs/demo.yaml --data_dir "$out/data/train" --log_dir "$out/train"
model=$(ls "$out"/train/ema_*.pt | tail -n 1)
run $two python scripts/image_sample_vae.py --model_path "$model" --users all --num_samples_per_user 8 --batch_size 62 \
    --num_steps 30 --use_ddim True --per_image_seed True --log_dir "$out/samples"
run python scripts/evaluate_samples.py --real_dir "$out/data/train" --heldout_dir "$out/data/test" \
    --samples "$out"/samples/samples_248x64x64x3.npz --out_dir "$out/report"

echo
echo "generated spectrograms: $out/samples/grid.png"
echo "real beside generated:  $out/report/comparison.png"
echo "numbers:                $out/report/report.json"
[ ! -d .venv ] || [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] || echo "your own commands:      . .venv/bin/activate, then README.md, \"Your own data\""
