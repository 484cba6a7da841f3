#!/usr/bin/env bash
# Trains a sparse ensemble and a dense single network on the same real text, then compares them on test documents.
set -euo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false

# Without the number of threads accelerate leaves all cores but one idle.
launch=(accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no
    --num_cpu_threads_per_process "$(nproc)")

python -m nt_transformers.data.prepare --output data/demo --sources boolq --vocab-size 1024
"${launch[@]}" \
    recipes/train_c4.py --config recipes/configs/demo.yaml
"${launch[@]}" \
    recipes/train_c4.py --config recipes/configs/demo.yaml --output_dir runs/demo_single \
    --model.num_ensemble_heads 1 --sparsity.method dense
python eval/perplexity.py --model runs/demo --model runs/demo_single --data data/demo/test \
    --unigram data/demo/train/train.00000-of-00008.json.gz --packing --sequence_length 64 \
    --prompt "The President of the United States" --output runs/demo/perplexity.json
