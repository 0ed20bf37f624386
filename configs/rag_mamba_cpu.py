"""The CPU's rag_mamba_d20: six Mamba-2 blocks, contexts twice as long as the hybrid's, up to ten documents in them.

It starts from a mid checkpoint of that pattern: scripts.base_train and scripts.mid_train with `--model_tag mamba_cpu`,
the former with `--depth 6 --n_embd 256 --block_pattern mamba`.
"""

source = "mid"
model_tag = "mamba_cpu"
block_pattern = "M6"
retriever_type = "hybrid"
top_k = 10
sequence_len = 2048
device_batch_size = 4
num_iterations = 550
lr_scale = 0.5
save_every = 100
