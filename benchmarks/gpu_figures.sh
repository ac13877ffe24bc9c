#!/usr/bin/env bash
# The figures of docs/benchmarks.md that want GPUs, on a machine with two of them; about 20 minutes with two H100s.
#   bash benchmarks/gpu_figures.sh MODEL OUT [PART ...]
# MODEL is a folder with an 8B model (random weights will do). Parts: pair (two GPUs), one, default (what a default run's time goes
# into), sweep, small (16 GiB), peers, memory, tests; all of them if none is named. `pair` comes first and `tests` last, on both GPUs;
# the others run side by side between them, half of them on each GPU.
set -uo pipefail
model=${1:?usage: gpu_figures.sh MODEL OUT [PART ...]} out=$(realpath -m "${2:?usage: gpu_figures.sh MODEL OUT [PART ...]}")
shift 2
all="pair one default sweep small peers memory tests"
for part in "$@"; do [[ " $all " == *" $part "* ]] || { echo "no part $part; there are: $all" >&2; exit 2; }; done
[[ -f $model/config.json ]] || { echo "$model holds no model: no config.json" >&2; exit 2; }
model=$(realpath "$model")
parts=" ${*:-$all} "
cd "$(dirname "$0")/.."
mkdir -p "$out"
rows=$out/rows.json long=$out/long.json
python3 benchmarks/make_rows.py "$rows" --rows 1000
python3 benchmarks/make_rows.py "$long" --rows 200 --words 1980
wanted() { [[ $parts == *" $1 "* ]]; }
speed() { python3 benchmarks/speed.py --model "$model" --data "$rows" --warm-up 25 "$@"; }
long_rows() { python3 benchmarks/speed.py --model "$model" --data "$long" --warm-up 4 --steps 14 "$@"; }
note() { echo "[$SECONDS s] $*"; }

two="trainer.torch_compile=true distributed.num_processes=2 trainer.per_device_train_batch_size=16"
if wanted pair; then
  speed --out "$out/pair" --only ours_bf16_32:200,ours_nf4_32:40 --overrides "$two trainer.gradient_accumulation_steps=2"
  note "two GPUs"
fi
(
  export CUDA_VISIBLE_DEVICES=0
  if wanted one; then
    speed --out "$out/one" --only ours_bf16_32_compiled:100,ours_bf16_8_compiled:100,ours_nf4_8_compiled:100,ours_nf4_8
    note "one GPU"
  fi
  if wanted default; then
    python3 train.py model.name="$model" dataset=local dataset.path="$rows" dataset.template=alpaca tracking=none \
      hydra.run.dir="$out/default" >"$out/default.log" 2>&1
    grep -A 6 '"seconds"' "$out/default/run.json"
    note "a default run"
  fi
  if wanted sweep; then
    python3 benchmarks/sweep_speed.py --model "$model" --data "$rows" --out "$out/sweep" \
      --overrides trainer.torch_compile=true >"$out/sweep.log" 2>&1
    tail -n 9 "$out/sweep.log"
    note "sweep"
  fi
) &
(
  export CUDA_VISIBLE_DEVICES=1
  if wanted small; then
    few="trainer.max_memory_gib=16 model.load_in_4bit=true trainer.torch_compile=true trainer.effective_batch_size=8"
    long_rows --out "$out/small" --only ours_auto_8 --overrides "$few"
    long_rows --out "$out/small" --only unsloth_nf4_8_checkpointing
    note "16 GiB"
  fi
  if wanted peers; then
    speed --out "$out/peers" --only notebook,unsloth_nf4_8,unsloth_bf16_8,trl_bf16_8
    note "peers"
  fi
  if wanted memory; then
    python3 benchmarks/memory_table.py --shapes 8b --lengths 512,2048,8192 --backends transformers
    python3 benchmarks/memory_table.py --shapes 1b --lengths 512,1024,2048,8192 --backends transformers
    note "memory"
  fi
) &
wait
if wanted tests; then  # alone: some of them measure memory, some want both GPUs
  SFT_TEST_GPU=1 python3 -m pytest tests/gpu -n 3 >"$out/tests.log" 2>&1
  tail -n 3 "$out/tests.log"
  note "tests"
fi
