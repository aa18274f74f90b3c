#!/bin/bash
# What only a GPU can tell, part after part, what matters most first; each has its own time limit and its own files.
#
#   benchmarks/gpu.sh                 all parts into results/gpu; what is done there isn't done again
#   benchmarks/gpu.sh speed profile   these parts only
#   SFTLAB_GPU_RESULTS=DIR benchmarks/gpu.sh
#   SFTLAB_GPU_TRIAL=1 benchmarks/gpu.sh      the same commands in their smallest form, on any machine
#
# A part that was stopped or failed is begun again by the next call, and makes only the runs that are missing; its whole
# output is in PART.log. The figures are PART*.json, the tables for benchmarks/README.md are at the end of the logs.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${SFTLAB_GPU_RESULTS:-results/gpu}
trial=${SFTLAB_GPU_TRIAL:-}
mkdir -p "$out"
export HF_HUB_OFFLINE=1
failed=0

# part NAME SECONDS COMMAND...: runs it within the seconds, unless it was done before or others were asked for
part() {
	local name=$1 limit=$2 start=$SECONDS
	shift 2
	if ((${#wanted[@]})) && [[ " ${wanted[*]} " != *" $name "* ]]; then return; fi
	if [ -e "$out/$name.done" ]; then echo "$name: done before"; return; fi
	echo "$name: at most $limit s: $*"
	if timeout --signal=INT --kill-after=20 "$limit" "$@" >"$out/$name.log" 2>&1; then
		touch "$out/$name.done"
		echo "$name: done in $((SECONDS - start)) s"
	else
		echo "$name: exit code $? after $((SECONDS - start)) s; the end of $out/$name.log:"
		tail -n 5 "$out/$name.log"
		failed=1
	fi
}

# figures NAME SECONDS CASE [OPTION...]: a case of train.py, whose finished runs are kept between calls
figures() {
	local name=$1 limit=$2 case=$3
	shift 3
	if [ -n "$trial" ]; then case=tiny-base; set -- --steps 2 --repeats 1 "$@"; fi
	part "$name" "$limit" python benchmarks/train.py --cases "$case" --folder "$out/train" --output "$out/$name.json" "$@"
}

wanted=("$@")
if [ -z "$trial" ] && ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
	echo "benchmarks/gpu.sh: torch sees no GPU here. SFTLAB_GPU_TRIAL=1 tries the commands out on a CPU."
	exit 2
fi

export SFTLAB_TEST_GPU=1
part tests 400 python -m pytest -q -p no:cacheprovider tests/test_gpu.py --deselect tests/test_gpu.py::test_deepspeed_trains_on_one_gpu
figures speed 240 "Qwen3-8B packed"                 # the lab alone, with and without Liger: goal half of the matrix rate
figures profile 150 "Qwen3-8B packed" --profile     # one step by kernel
figures compare 540 "Qwen3-8B"                      # against TRL's defaults, TRL tuned, TRL with Liger
part deepspeed 300 python -m pytest -q -p no:cacheprovider tests/test_gpu.py::test_deepspeed_trains_on_one_gpu
# QLoRA on the 70B shape first (goal 48 GiB), then the other peaks that the estimate has never seen, then 8 bits to the end.
cases=("Llama-2-70b LoRA 4 bits 2048" "Qwen3-8B LoRA packed" "Llama-3.1-8B LoRA 4 bits" "Mistral-7B full 8-bit optimizer"
	"gemma-7b LoRA 8 bits" "Qwen3-0.6B full" "Llama-2-13b LoRA, 8 bits")
if [ -n "$trial" ]; then cases=("tiny-base LoRA"); fi
for case in "${cases[@]}"; do
	name="memory-${case//[ ,]/-}"
	part "$name" 150 python benchmarks/memory.py --cases "$case" --output "$out/$name.json"
done
for notebook in 00_start_here 05_lora 06_qlora 07_memory_and_speed 11_evaluate 12_export 14_capstone; do
	if [ -n "$trial" ]; then profile=smoke; model=random-tiny:Qwen3-8B; else profile=gpu; model=random:Qwen3-8B; fi
	part "$notebook" 240 python -m sftlab run "notebooks/$notebook.ipynb" --profile "$profile" -p model_name "$model" \
		--output-dir "$out/$notebook-$(date +%H%M%S)"
done
exit $failed
