#!/usr/bin/env bash
# From an empty machine to a model that reads documents:  bash speedrun.sh
#
#   SPEEDRUN=smoke|cpu|node  how much: smoke, a few minutes that show every stage runs (it learns little); cpu, at most
#                            40 minutes on two cores with bf16 units; node, 8 GPUs. Default: node with a GPU, else cpu.
#   NANOCHAT_BASE_DIR=path   where everything is written (default ~/.cache/nanochat)
#   NPROC=n                  processes a training stage uses (default: the number of GPUs, else 1)
#
# Run it again after an interruption and it goes on where it stopped: a finished stage returns at once, a training
# stage continues from its last checkpoint.
set -euo pipefail
cd "$(dirname "$0")"
source ./setup.sh

gpus=$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)
preset=${SPEEDRUN:-$([ "$gpus" -gt 0 ] && echo node || echo cpu)}
export NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}"
NPROC=${NPROC:-$([ "$gpus" -gt 0 ] && echo "$gpus" || echo 1)}
# threads that wait for work sleep instead of spinning: on a machine that does other things too, that is faster
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}

case $preset in
smoke)
    tag=smoke retriever=bm25 n=40
    tok="--max_chars 3000000 --vocab_size 2048"
    common="--resume true --save_every 50 --device_batch_size 4"
    base="--depth 3 --n_embd 128 --num_iterations 30 --sequence_len 256 --val_batches 2 --eval_every 15"
    mid="--num_iterations 20 --val_batches 2 --eval_every 20 --sequence_len 384"
    sft="--num_iterations 10 --sequence_len 256"
    rag="--num_iterations 20 --val_examples 10 --sequence_len 640 --device_batch_size 2"
    ;;
cpu)
    tag=cpu retriever=hybrid n=500
    tok=""
    common="--resume true --save_every 100"
    base="--depth 6 --n_embd 256 --num_iterations 500 --drill_until 0.7 --warmdown_ratio 0.3"
    mid="--num_iterations 600 --warmdown_ratio 0.3"
    sft="--num_iterations 60"
    rag="--num_iterations 450 --device_batch_size 6"
    ;;
node)
    tag=d20 retriever=hybrid n=500
    tok="--data fineweb:8 --vocab_size 32768 --max_chars 2000000000"
    common="--resume true --save_every 500"
    base="--data fineweb:240 --depth 20 --sequence_len 2048 --device_batch_size 16 --total_batch_size 524288 --num_iterations 20000 --drill_until 0.05"
    mid="--data fineweb:240 --sequence_len 2048 --device_batch_size 16 --total_batch_size 524288 --num_iterations 800"
    sft="--sequence_len 2048 --device_batch_size 16 --num_iterations 200"
    rag="--sequence_len 2048 --device_batch_size 8 --num_iterations 1000"
    ;;
*)
    echo "error: SPEEDRUN=$preset: choose smoke, cpu or node" >&2
    exit 2
    ;;
esac

out="$NANOCHAT_BASE_DIR"
data="$out/factbook"
kb="$data/knowledge_base"
if [ "$NPROC" -gt 1 ]; then run="torchrun --standalone --nproc_per_node=$NPROC -m"; else run="python -m"; fi
begin=$SECONDS

stage() { # stage NAME COMMAND...: run it, tell how long it took
    local name=$1 start=$SECONDS
    shift
    printf '\n== %s: %s\n' "$name" "$*"
    "$@"
    printf '%s\t%s\n' "$name" "$((SECONDS - start))" >>"$out/times.tsv"
}
mkdir -p "$out/evals"
echo "preset $preset, $(nproc) cores, $gpus GPUs, results in $out"
python -m scripts.estimate --preset "$preset" --base "$base" --mid "$mid" --sft "$sft" --rag "$rag"

# shellcheck disable=SC2086  # the settings above are lists of words
{
    [ -f "$out/tokenizer/tokenizer.json" ] || stage tokenizer python -m scripts.tok_train $tok
    stage "tokenizer evaluation" python -m scripts.tok_eval --output "$out/evals/tok_eval.json"
    stage "knowledge base" python -m scripts.prepare_rag_dataset --mode factbook --type $retriever --output "$data"
    stage pretraining $run scripts.base_train --model_tag $tag $common $base
    stage "base evaluation" python -m scripts.base_eval --model_tag $tag --max_examples $n --output "$out/evals/base_eval.json"
    stage midtraining $run scripts.mid_train --source_tag $tag --model_tag $tag $common $mid
    stage "chat SFT" $run scripts.chat_sft --source_tag $tag --model_tag $tag $common $sft
    stage "chat evaluation" python -m scripts.chat_eval --model_tag $tag --max_examples $n --output "$out/evals/chat_eval.json"
    stage "RAG SFT" $run scripts.rag_finetune --model_tag $tag --knowledge_base "$kb" --retriever_type bm25 $common $rag
    stage "RAG evaluation" python -m scripts.rag_eval --model_tag $tag --knowledge_base "$kb" --queries "$data/queries/test.jsonl" \
        --retriever_type $retriever --max_examples $n --output "$out/evals/rag_eval.json"
}
python -m nanochat.report --evals "$out/evals" --output "$out/report"
echo
echo "seconds per stage:"
cat "$out/times.tsv"
echo "total of this run: $(((SECONDS - begin) / 60)) min. Chat with your model:"
echo "  source .venv/bin/activate; python -m scripts.chat_cli --source rag --model_tag $tag --knowledge_base $kb"
