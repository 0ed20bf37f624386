"""The CPU's rag_hybrid_d20: the same mix and pattern (two Mamba-2 blocks, one that attends), 6 layers of width 256.

For the checkpoints of `bash speedrun.sh` on two cores (its preset `cpu`), with that preset's steps and rates.
"""

source = "mid"
model_tag = "cpu"
block_pattern = "MMTMMT"
retriever_type = "hybrid"
top_k = 5
sequence_len = 1024
device_batch_size = 8
num_iterations = 550
lr_scale = 0.5
save_every = 100
