"""What a training run needs, told before it starts: parameters, FLOPs, memory of one process. `--dry_run true`.

    python -m scripts.base_train --depth 8 --dry_run true
    WORLD_SIZE=8 python -m scripts.rag_finetune --config configs/rag_hybrid_d20.py --device cuda --dry_run true

Nothing is trained or loaded: the shape is enough. The tensors counted are those that nanochat/blocks, gpt.py and
optim.py keep, path by path. On CPUs the paths are the compiled kernels', and benchmarks/memory.py compares the sum with
measured peaks; what imports take comes on top. Of CUDA nothing was ever measured: the figure is the same count along
the path that would run there (FlashAttention through SDPA, the kernels of mamba_ssm and causal_conv1d, the gated norm
in eager fp32, fused RMSNorm), without the CUDA context, NCCL's buffers and the allocator's gaps: 1 to 2 GB more.

Sizes are in bytes; C is the width, E = 2 C Mamba's inner width, H heads, s the bytes of the compute dtype.
"""

import os
from math import ceil
from types import SimpleNamespace

import torch

from nanochat.checkpoint_manager import find_checkpoint, read_meta
from nanochat.common import Dist, UserError, autodetect_device, get_base_dir, human, parse_pattern, pick_dtype, print0
from nanochat.gpt import GPT, GPTConfig, _HeadLoss
from nanochat.tokenizer import Tokenizer
from nanochat.train import TrainConfig, micro_batches

CHUNK = 64  # of the SSD scan on CPUs
# What a CPU process has resident beyond its tensors: scratch of libraries, and the heap's gaps, as training has glibc
# keep freed memory (keep_memory). Shares of what comes and goes, plain and with checkpointing, whose moments differ
# more. These three are fitted to what benchmarks/memory.py measured on one machine (docs/LOG.md). Tensors are counted.
SCRATCH, GAPS = 20e6, (0.2, 0.7)


def kept(kind: str, c: GPTConfig, s: int, cuda: bool) -> float:
    """Bytes a token that one block keeps from its forward for its backward."""
    C, E = c.n_embd, 2 * c.n_embd
    if kind == "T":  # input, norm, q k v, output, input and norm of the MLP, its hidden layer
        stats = 4 * (3 * c.n_head + 2)  # of norms and softmax
        if cuda:  # q and k also before RoPE and before their norm; the hidden layer also squared
            return s * 20 * C + stats
        return s * 12 * C + stats
    H, N = E // c.headdim, c.d_state
    projected, conv = 2 * E + 2 * N + H, E + 2 * N
    if cuda:  # input, norm, projection, convolution, scan; the gated norm's five fp32 tensors and its result
        return s * (2 * C + projected + 2 * conv + 2 * E) + 4 * (5 * E + 3 * H)
    chunks = CHUNK + H * CHUNK + N * E / CHUNK  # C Bᵀ, the mask M, the state that enters each chunk
    return s * (2 * C + projected + conv + chunks + 3 * E) + 4 * (3 * H + 2)


def passing(kind: str, c: GPTConfig, s: int, cuda: bool) -> float:
    """Bytes a token that the backward of one block has beside what was kept, at its widest."""
    C, E = c.n_embd, 2 * c.n_embd
    if kind == "T":  # the MLP's: gradients of output, input, hidden layer and its square
        return s * 10 * C
    H, N = E // c.headdim, c.d_state
    inside = 2 * E + 2 * N + H + E + 2 * N  # gradients of the projection and of the convolution
    return s * (2 * C + E + inside) + 4 * (3 * E if cuda else 10 * H)


def memory(
    c: GPTConfig, rows: int, length: int, device: str, dtype: torch.dtype, world: int = 1, checkpointing: bool = False
) -> dict[str, float]:
    """Bytes of one process by part, and the "peak": the largest of the head's, a block's and the update's moment."""
    with torch.device("meta"):
        model = GPT(c)
    s, n, cuda = dtype.itemsize, rows * length, device.startswith("cuda")
    # 1. What stays: flat buckets, each rank with the optimizer state of its slice
    weights = state = 0
    update = 0.0
    for group in model.param_groups(0, 0, 0, 0, 0):
        if group["kind"] == "adamw":
            size = sum(p.numel() for p in group["params"])
            weights, state = weights + size, state + 2 * size / world
            continue
        for shape in {p.shape for p in group["params"]}:
            own = ceil(sum(p.shape == shape for p in group["params"]) / world)
            size = own * shape.numel()
            weights, state = weights + size * world, state + size
            square = own * min(shape) ** 2
            update = max(update, 2 * (2 * size + 2 * square), (2 if cuda else 6) * size)  # Newton-Schulz in bf16
    parts = {"weights": 4.0 * weights, "gradients": 4.0 * weights * (1 + (1 / world if world > 1 else 0))}
    parts["optimizer"] = 4.0 * state
    # 2. What the forward keeps. Recomputed, only the inputs of blocks are; one block at a time is whole
    casts = [s * sum(p.numel() for p in b.parameters() if p.ndim == 2) if s < 4 else 0.0 for b in model.blocks]
    wide = {kind: n * kept(kind, c, s, cuda) for kind in "TM"}
    C, V = c.n_embd, c.vocab_size
    for kind in "TM":
        parts[f"activations {kind}"] = c.block_pattern.count(kind) * (n * C * s if checkpointing else wide[kind])
    parts["casts"] = 0.0 if checkpointing else sum(casts)
    ends = n * (2 * C * s + 8 + 16)  # embedding and last norm, ids, targets
    # 3. And the widest moment beside it
    chunk, table = min(_HeadLoss.CHUNK, n), V * C
    logits = s * chunk * V * (2 if cuda else 1)  # on GPUs also their softmax
    before = s * chunk * V if n > chunk else 0  # the gradient of the chunk before
    product = table * (s if cuda or s == 4 else s + 4)  # of a chunk's gradient of the head
    forward = 4 * table + (s * table if s < 4 else 0) + 3 * n * C * s + logits + max(before, product)
    backward = 8 * table + 3 * n * C * s
    blocks = 0.0
    for block, kind, cast in zip(model.blocks, c.block_pattern, casts):
        gradient = (4 + (s if s < 4 else 0)) * max(p.numel() for p in block.parameters())
        again = wide[kind] + cast if checkpointing else 0.0
        blocks = max(blocks, again + gradient + n * passing(kind, c, s, cuda))
    staying = sum(v for k, v in parts.items() if k in ("weights", "gradients", "optimizer"))
    running = sum(parts.values()) - staying + ends
    parts["at the head"], parts["or in a block's backward"] = max(forward, backward) + ends, blocks + ends
    parts["or in the update, without activations"] = update
    parts["peak"] = staying + max(running + max(forward, backward, blocks), update)
    if not cuda:
        parts["resident, with the heap's gaps"] = (
            parts["peak"] + SCRATCH + GAPS[checkpointing] * (parts["peak"] - staying)
        )
    return parts


def dry_run(config: TrainConfig, shape: GPTConfig) -> dict[str, float]:
    """Print what a run with `config` of a model of `shape` would need; bytes by part are returned.

    `--device cuda` needs no GPU here, and WORLD_SIZE (torchrun sets it) says how many processes share the optimizer.
    """
    device, world = config.device or autodetect_device(), int(os.environ.get("WORLD_SIZE", 1))
    name = "bfloat16" if config.dtype == "auto" and device.startswith("cuda") else config.dtype
    dtype, rows, length = pick_dtype(device, name), config.device_batch_size, config.sequence_len or shape.sequence_len
    if min(rows, length) < 1:
        raise UserError(f"--device_batch_size {rows} and --sequence_len {length}: at least 1")
    loader = SimpleNamespace(batch_size=rows, sequence_len=length)
    accumulate = micro_batches(config, loader, Dist(0, 0, world, torch.device(device)))
    with torch.device("meta"):
        model = GPT(shape)
    tokens, flops = accumulate * rows * length * world, model.flops_per_token(length)
    print0(
        f"dry run: {shape.block_pattern}, width {shape.n_embd}, vocabulary {shape.vocab_size}, {length} tokens a row"
    )
    print0("parameters: " + ", ".join(f"{part} {human(count)}" for part, count in model.num_params().items()))
    print0(
        f"FLOPs: {human(flops)} a trained token, {human(flops * tokens)} a step of {tokens} tokens "
        f"({world} processes x {accumulate} micro-batches x {rows} rows)"
    )
    shown = [memory(shape, rows, length, device, dtype, world, checkpointing) for checkpointing in (False, True)]
    print0(f"memory of one process in GB, {device}, {str(dtype).removeprefix('torch.')}:")
    print0(f"  {'':44s}{'plain':>8s}{'with --gradient_checkpointing true':>37s}")
    for part in shown[0]:
        print0(f"  {part:44s}{shown[0][part] / 1e9:8.3f}{shown[1][part] / 1e9:16.3f}")
    if device == "cpu":
        print0("counted for the compiled CPU kernels; python -m benchmarks.memory compares it with measured peaks")
    else:
        print0(
            "counted, never measured on a GPU; assumes FlashAttention and the kernels of mamba_ssm and causal_conv1d,"
        )
        print0("all positions as targets; CUDA's context, NCCL and the allocator's gaps come on top: 1 to 2 GB")
    return shown[config.gradient_checkpointing]


def vocabulary(depth: int) -> int:
    """Tokens of this machine's tokenizer; before there is one, those that speedrun.sh would train at that depth."""
    folder = get_base_dir() / "tokenizer"
    if (folder / "tokenizer.json").exists():
        return Tokenizer.load(folder).vocab_size
    return 32768 if depth >= 12 else 8192


def checkpoint_shape(source: str, tag: str = "", step: int = 0, pattern: str = "") -> GPTConfig:
    """The shape in a checkpoint's meta.json; if there is none, that of a model to be trained with `pattern`."""
    try:
        path = find_checkpoint(source, tag or None, step or None)
        return GPTConfig(**read_meta(path)["model_config"])
    except UserError as e:
        if not pattern:
            raise
        print0(f"{e}; taking --block_pattern with a width of 64 x depth")
    except (KeyError, TypeError) as e:
        raise UserError(f"{path}/meta.json has settings this version doesn't know: {e}") from e
    depth = len(parse_pattern(pattern))
    return GPTConfig.from_depth(depth, parse_pattern(pattern), vocab_size=vocabulary(depth))
