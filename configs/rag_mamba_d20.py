"""RAG fine-tuning of the pure Mamba-2 model at depth 20 on 8 GPUs.

    python -m scripts.rag_finetune --config configs/rag_mamba_d20.py --knowledge_base KB      (under torchrun)

Contexts of 8192 tokens with up to ten documents. It starts from a checkpoint of that pattern: scripts.base_train and
scripts.mid_train with `--model_tag mamba_d20`, the former with `--depth 20 --block_pattern mamba`. Never run by us.
Estimated: 33 GB a GPU, 6 GB with `gradient_checkpointing`, and 1 to 2 GB for CUDA (`--device cuda --dry_run true`).
"""

source = "mid"
model_tag = "mamba_d20"
block_pattern = "M20"
retriever_type = "hybrid"
top_k = 10
sequence_len = 8192
device_batch_size = 2
total_batch_size = 8 * 2 * 8192
num_iterations = 1000
save_every = 500
