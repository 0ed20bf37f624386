"""RAG fine-tuning of the hybrid at depth 20 on 8 GPUs: scripts.rag_finetune --config configs/rag_hybrid_d20.py

Contexts of 4096 tokens with up to five documents. The pattern is what `--block_pattern hybrid` gives at this depth; a
checkpoint with another one needs its own here. Never run by us: there was no GPU. What it takes, estimated:

    WORLD_SIZE=8 python -m scripts.rag_finetune --config configs/rag_hybrid_d20.py --device cuda --dry_run true

Estimated: 31 GB a GPU, 7 GB with `gradient_checkpointing`, and 1 to 2 GB for CUDA. Depth 16 (context 2048, vocabulary
32768, one GPU) does train in 16 GB: 12 GB plain at 4 rows, 20 GB plain and 5 GB with checkpointing at 8.
"""

source = "mid"
model_tag = "d20"
block_pattern = "MMTMMTMMTMMTMMTMMTMM"
retriever_type = "hybrid"
top_k = 5
sequence_len = 4096
device_batch_size = 4
total_batch_size = 8 * 4 * 4096
num_iterations = 1000
save_every = 500
