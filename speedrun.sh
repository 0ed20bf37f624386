#!/usr/bin/env bash
# From an empty machine to a model that reads documents:  bash speedrun.sh
#
#   SPEEDRUN=smoke|cpu|node  how much: smoke, a few minutes that show every stage runs (it learns little); cpu, an
#                            hour or more on two cores with bf16 units, and on a GPU if there is one; node, 8 GPUs,
#                            depth 20, never run by us. Default: node with 8 GPUs or more, else cpu.
#   NANOCHAT_BASE_DIR=path   where everything is written (default ~/.cache/nanochat/<preset>)
#   NPROC=n                  processes a training stage uses (default: without GPUs 2; for node their number; else 1)
#
# Run it again after an interruption and it goes on where it stopped: what is finished is not done again, a training
# stage continues from its last checkpoint. setup.sh says which Python and which PyTorch it uses.
set -euo pipefail
absolute() { mkdir -p -- "$1" && cd -- "$1" >/dev/null && pwd; }
[ -z "${NANOCHAT_BASE_DIR:-}" ] || NANOCHAT_BASE_DIR=$(absolute "$NANOCHAT_BASE_DIR")
cd "$(dirname "$0")"

stop() {
    echo "error: $1" >&2
    exit 2
}
case ${SPEEDRUN:-cpu} in smoke | cpu | node) ;; *) stop "SPEEDRUN=$SPEEDRUN: choose smoke, cpu or node" ;; esac
case ${NPROC:-1} in 0* | *[!0-9]*) stop "NPROC=$NPROC: a number of processes, at least 1" ;; esac

source ./setup.sh
machine=$(python -c "import os, torch; print(os.cpu_count(), torch.cuda.device_count())")
read -r cores gpus <<<"$machine"
preset=${SPEEDRUN:-$([ "$gpus" -ge 8 ] && echo node || echo cpu)}
case $preset.$gpus in # on cores that do other things, too, two processes that meet once a step are faster than two threads
cpu.0 | smoke.0) processes=$((cores > 1 ? 2 : 1)) ;;
node.[1-9]*) processes=$gpus ;;
*) processes=1 ;;
esac
NPROC=${NPROC:-$processes}
export NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat/$preset}"
# threads that wait for work sleep instead of spinning: on a machine that does other things too, that is faster
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}

share() { # share ROWS: a process's part of the rows of a step, at least one
    echo "--device_batch_size $(($1 < NPROC ? 1 : $1 / NPROC))"
}
case $preset in
smoke)
    tag=smoke retriever=bm25 n=20 text=embedded
    tok="--max_chars 3000000 --vocab_size 2048"
    common="--resume true --save_every 50 $(share 4)"
    base="--depth 3 --n_embd 128 --num_iterations 30 --sequence_len 256 --val_batches 2 --eval_every 15"
    mid="--num_iterations 20 --val_batches 2 --eval_every 20 --sequence_len 384"
    sft="--num_iterations 10 --sequence_len 256"
    evidence="--num_iterations 6 --val_examples 10 $(share 16)"
    rag="--num_iterations 20 --val_examples 10 --sequence_len 640"
    ;;
cpu)
    tag=cpu retriever=hybrid n=500 text=embedded
    tok=""
    common="--resume true --save_every 100 $(share 8)"
    base="--depth 6 --n_embd 256 --num_iterations 600 --drill_until 0.75 --drill_share 0.2 --warmdown_ratio 0.2"
    mid="--num_iterations 350 --lr_scale 0.5 --warmdown_ratio 1.0"
    sft="--num_iterations 60"
    evidence="--num_iterations 1000 --eval_every 500 $(share 32)"
    rag="--num_iterations 250 --lr_scale 0.5"
    ;;
node)
    tag=d20 retriever=hybrid n=500 text=fineweb:240
    tok="--data fineweb:8 --vocab_size 32768 --max_chars 2000000000"
    common="--resume true --save_every 500 --sequence_len 2048 --device_batch_size 8"
    # half a million tokens a step, or the multiple of what all processes take at once that comes closest
    micro=$((8 * 2048 * NPROC))
    accumulate=$(((524288 + micro / 2) / micro))
    batch="--total_batch_size $((micro * (accumulate > 0 ? accumulate : 1)))"
    base="--data $text --depth 20 $batch --num_iterations 20000 --drill_until 0.05"
    mid="--data $text $batch --num_iterations 800"
    sft="--num_iterations 10" # at 131k tokens a step, the few chat pairs have been seen several times by then
    evidence="--num_iterations 1000 --device_batch_size 64"
    rag="--num_iterations 1000"
    ;;
esac

few=$((n < 200 ? n : 200)) # questions where a glance will do
out="$NANOCHAT_BASE_DIR"
data="$out/factbook"
kb="$data/knowledge_base"
books="$out/handbooks"
world="$out/fiction"
if [ "$NPROC" -gt 1 ]; then # torchrun, of the python in use
    threads=$((gpus > 0 || cores < NPROC ? 1 : cores / NPROC))
    run="env OMP_NUM_THREADS=${OMP_NUM_THREADS:-$threads} python -m torch.distributed.run --standalone --nproc_per_node=$NPROC -m"
else
    run="python -m"
fi
begin=$SECONDS
trap 'echo "interrupted; the same command goes on from here" >&2; exit 130' INT

product() { # product WHAT: the file that is new when WHAT is: for a training stage in the last checkpoint, else WHAT
    case $1 in # what answers is the language model and the evidence reader, what is asked the tests
    answers) ls -t "$out"/checkpoints/{evidence,rag}/"$tag"/step_*/meta.json "$out"/*/queries/test.jsonl 2>/dev/null | head -n 1 ;;
    base | mid | sft | evidence | rag) ls "$out/checkpoints/$1/$tag"/step_*/meta.json 2>/dev/null | tail -n 1 ;;
    *) echo "$1" ;;
    esac
}

stage() { # stage NAME MAKES FROM COMMAND...: run COMMAND unless what it MAKES is newer than what that is made FROM
    local name=$1 makes=$2 from=$3 start=$SECONDS # FROM "": it is enough that it is there; "-": COMMAND looks itself
    shift 3
    if [ "$from" != - ] && [ "$(product "$makes")" -nt "$(product "$from")" ]; then
        printf '\n== %s: already done\n' "$name"
        return
    fi
    printf '\n== %s: %s\n' "$name" "${*%%$'\n'*}"
    touch "$out/.stage"
    "$@" || {
        local code=$?
        echo "stopped in stage '$name': see above; the same command goes on from here," \
            "another NANOCHAT_BASE_DIR begins anew" >&2
        exit $code
    }
    if [ ! "$out/.stage" -nt "$(product "$makes")" ]; then # it did run: note the seconds, one line a stage
        touch "$out/times.tsv"
        awk -F '\t' -v OFS='\t' -v name="$name" -v seconds="$((SECONDS - start))" \
            '$1 == name { $2 = seconds; seen = 1 } { print } END { if (!seen) print name, seconds }' \
            "$out/times.tsv" >"$out/.times" && mv "$out/.times" "$out/times.tsv"
    fi
}

evaluate() { # evaluate NAME RESULT OF SCRIPT FLAGS...: results go to evals/RESULT.json, and stay while OF is older
    local name=$1 result=$2 of=$3 script=$4
    shift 4
    stage "$name" "$out/evals/$result.json" "$of" $run "scripts.$script" "$@" --output "$out/evals/$result.json"
}

mkdir -p "$out/evals"
echo "preset $preset, $cores cores, $gpus GPUs, $NPROC training processes, results in $out"
if [ "$preset" = node ]; then
    echo "NOTE: the node preset has never been run: we have no such machine. Its sizes are reckoned, not tried."
elif [ "$gpus" -gt 0 ]; then
    echo "NOTE: nothing here has been run on a GPU by us; SPEEDRUN=node (depth 20) is meant for 8 of them."
elif [ -n "$(nvidia-smi --list-gpus 2>/dev/null || true)" ]; then
    echo "NOTE: there is a GPU, but this PyTorch doesn't see it (a CPU build?); README.md says how to choose a build."
fi
# to a first run it tells how long; a failed estimate is no reason to stop, Ctrl-C is
[ -f "$out/evals/rag_eval.json" ] ||
    python -m scripts.estimate --preset "$preset" --nproc "$NPROC" --tok "$tok" \
        --base "$common $base" --mid "$common $mid" --sft "$common $sft" --rag "$common $rag" --evidence "$evidence" || {
    [ $? -ne 130 ] || exit 130
    echo "no estimate for this machine; going on without"
}

# one process alone: those of a training stage would all wait for the one that downloads, for hours perhaps
download='# all shards, train and val
import sys
from nanochat.common import UserError
from nanochat.dataset import load_texts
try:
    sizes = [len(load_texts(sys.argv[1], split)) for split in ("train", "val")]
except UserError as e:
    sys.exit(f"error: {e}")
open(sys.argv[2], "w").write(f"{sys.argv[1]}: {sizes[0]} documents, {sizes[1]} held out\n")'

# shellcheck disable=SC2086  # the settings above are lists of words
{
    [ $text = embedded ] || stage download "$out/.downloaded" "" python -c "$download" $text "$out/.downloaded"
    stage tokenizer "$out/tokenizer/tokenizer.json" "" python -m scripts.tok_train $tok
    stage "tokenizer evaluation" "$out/evals/tok_eval.json" "$out/tokenizer/tokenizer.json" \
        python -m scripts.tok_eval --output "$out/evals/tok_eval.json"
    stage "knowledge base" "$data/conversations/val_rag.jsonl" data/factbook/knowledge_base/documents.jsonl \
        $run scripts.prepare_rag_dataset --mode factbook --type $retriever --output "$data"
    stage handbooks "$books/conversations/val_rag.jsonl" "$(ls -t data/handbooks/*.txt | head -n 1)" \
        $run scripts.prepare_rag_dataset --mode handbooks --type $retriever --output "$books"
    stage "invented world" "$world/conversations/val_rag.jsonl" "$(ls -t data/fiction/*.txt | head -n 1)" \
        $run scripts.prepare_rag_dataset --mode fiction --type $retriever --output "$world"
    stage pretraining base - $run scripts.base_train --model_tag $tag $common $base
    evaluate "base evaluation" base_eval base base_eval --model_tag $tag --data $text --max_examples $few
    stage midtraining mid - $run scripts.mid_train --source_tag $tag --model_tag $tag $common $mid
    stage "chat SFT" sft - $run scripts.chat_sft --source_tag $tag --model_tag $tag $common $sft
    evaluate "chat evaluation" chat_eval sft chat_eval --model_tag $tag --max_examples $few
    stage "evidence reader" evidence - \
        $run scripts.evidence_train --model_tag $tag --knowledge_base "$kb" --resume true --save_every 100 $evidence
    stage "RAG SFT" rag - \
        $run scripts.rag_finetune --model_tag $tag --knowledge_base "$kb" --retriever_type bm25 $common $rag
    evaluate "RAG evaluation" rag_eval answers rag_eval --model_tag $tag --max_examples $n --retriever_type $retriever \
        --knowledge_base "$kb" --queries "$data/queries/test.jsonl" \
        --calibrate "$data/queries/val.jsonl,$books/queries/val.jsonl,$world/queries/val.jsonl"
    rows="oracle,retrieved,distractors_only,unanswerable,two_hop,two_hop_half"
    evaluate "handbook evaluation" rag_eval_handbooks answers rag_eval --model_tag $tag --max_examples $n \
        --retriever_type $retriever --knowledge_base "$books/knowledge_base" --queries "$books/queries/test.jsonl" \
        --rows $rows
    evaluate "invented world's evaluation" rag_eval_fiction answers rag_eval --model_tag $tag --max_examples $n \
        --retriever_type $retriever --knowledge_base "$world/knowledge_base" --queries "$world/queries/test.jsonl" \
        --rows closed_book,$rows,contradictory_dated,contradictory_undated
}
echo
python -m nanochat.report --evals "$out/evals" --output "$out/report"
echo
echo "seconds per stage, each when it last ran:"
cat "$out/times.tsv"
echo "this run: $(((SECONDS - begin) / 60)) min $(((SECONDS - begin) % 60)) s. Chat with your model:"
printf '  cd %q && NANOCHAT_BASE_DIR=%q %q -m scripts.chat_cli --source rag --model_tag %q --knowledge_base %q\n' \
    "$PWD" "$out" "$(command -v python)" "$tag" "$kb"
