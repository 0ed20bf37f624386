"""The model: attention and the loss against their definitions, cached against uncached, and what it refuses."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.blocks import attention, gemv
from nanochat.blocks.transformer import Attention, KVState, Positions, rope_table
from nanochat.common import Linear, UserError
from nanochat.gpt import GPT, Cache, GPTConfig, _HeadLoss, config_dict, head_loss

V, C = 97, 32


def make(pattern: str, seed: int = 0, n_kv_head: int = 2, dtype: torch.dtype = torch.float32) -> GPT:
    """A small model whose residual branches are not zero, as they are at initialisation."""
    torch.manual_seed(seed)
    config = GPTConfig(64, V, len(pattern), 2, n_kv_head, C, pattern, d_state=16, headdim=16)
    model = GPT(config)
    model.init_weights()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2 and not p.any():
                p.normal_(0, 0.2)
        model.lm_head.weight.normal_(0, 0.3)
    return model.set_compute_dtype(dtype)


def ids_of(shape, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, V, shape, generator=torch.Generator().manual_seed(seed))


# fp32 sums in another order: 1e-4 is some 100 roundings of logits of size ~3
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
def test_attention_is_a_softmax_over_the_past(n_kv_head):
    torch.manual_seed(0)
    B, T, H, D = 2, 9, 4, 8
    attention = Attention(H * D, H, n_kv_head)
    x = torch.randn(B, T, H * D)
    cos, sin = rope_table(T, D, 10000.0, x.device)
    got = attention(x, Positions(0, T, cos, sin, x.dtype))

    q, k, v = (x @ attention.qkv.weight.t()).view(B, T, -1, D).split((H, n_kv_head, n_kv_head), dim=2)

    def turn(u, t):  # RoPE by complex numbers: coordinate pair (i, i + D/2) of position t turns by t * base^(-2i/D)
        z = torch.complex(u[..., : D // 2], u[..., D // 2 :])
        z = z * torch.exp(1j * t * 10000.0 ** (-torch.arange(0, D, 2) / D))
        u = torch.cat((z.real, z.imag), -1)
        return u / (u.pow(2).mean(-1, keepdim=True) + torch.finfo(u.dtype).eps).sqrt()

    y = torch.zeros(B, T, H, D)
    for b in range(B):
        for h in range(H):
            kv = h // (H // n_kv_head)
            for t in range(T):
                query = turn(q[b, t, h], t)
                weights = torch.stack([query @ turn(k[b, s, kv], s) / math.sqrt(D) for s in range(t + 1)]).softmax(0)
                y[b, t, h] = weights @ v[b, : t + 1, kv]
    torch.testing.assert_close(got, y.reshape(B, T, -1) @ attention.out.weight.t(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_row_products_of_the_decoder_are_those_of_the_linear_layer(dtype):
    if gemv.library() is None:
        pytest.skip("no C++ compiler: PyTorch does it")
    torch.manual_seed(0)
    for n, k in ((1, 1), (5, 7), (64, 128), (1000, 333)):
        slow, fast = (torch.nn.Sequential(Linear(k, n)).to(dtype) for _ in range(2))
        fast.load_state_dict(slow.state_dict())
        gemv.speed_up(fast)
        assert type(fast[0]) is gemv.DecodeLinear
        x = torch.randn(1, 1, 2 * k).to(dtype)[..., ::2]
        with torch.no_grad():
            want = x.double() @ slow[0].weight.double().t()
            # one rounding of the result: 2^-24 of fp32 (and its sum's), 2^-9 of bf16
            tol = 1e-5 if dtype == torch.float32 else 2**-8
            torch.testing.assert_close(fast(x).double(), want, rtol=tol, atol=tol)
            rows = torch.randn(3, 1, k).to(dtype)
            torch.testing.assert_close(fast(rows), slow(rows), rtol=tol, atol=tol)
            torch.testing.assert_close(fast(x.expand(9, 1, k)), slow(x.expand(9, 1, k)))  # more rows: PyTorch's
        fast(x).sum().backward()  # with gradients on: PyTorch's, too
        assert fast[0].weight.grad is not None


@settings(max_examples=25, deadline=None)
@given(
    st.text("TM", min_size=1, max_size=4),
    st.lists(st.integers(1, 40), min_size=1, max_size=5),
    st.sampled_from([1, 2]),
    st.integers(0, 3),
)
def test_cached_and_uncached_logits_agree_for_any_pattern_and_split(pattern, pieces, n_kv_head, seed):
    model = make(pattern, seed, n_kv_head)
    ids = ids_of((2, sum(pieces)), seed)
    with torch.no_grad():
        want = model(ids)
        cache = model.new_cache(2)
        got = torch.cat([model(part, cache=cache) for part in ids.split(pieces, dim=1)], dim=1)
    torch.testing.assert_close(got, want, **CLOSE)
    assert cache.length == sum(pieces)


@settings(max_examples=15, deadline=None)
@given(st.text("TM", min_size=1, max_size=3), st.lists(st.integers(1, 150), min_size=2, max_size=4), st.integers(1, 3))
def test_stacked_caches_of_different_lengths_equal_single_rows(pattern, lengths, more):
    model = make(pattern)
    with torch.no_grad():
        singles = []
        for i, n in enumerate(lengths):
            cache = model.new_cache()
            model(ids_of((1, n), i), cache=cache)
            singles.append(cache)
        batch = Cache.stack(singles)
        for step in range(3):  # several tokens, then single ones
            new = ids_of((len(lengths), more if step == 0 else 1), 50 + step)
            got = model(new, cache=batch)
            want = torch.cat([model(new[i : i + 1], cache=c) for i, c in enumerate(singles)])
            torch.testing.assert_close(got, want, **CLOSE)
        rows = [len(lengths) - 1, 0, 0]
        some = batch.select(rows)
        new = ids_of((3, 1), 99)
        want = torch.cat([model(new[i : i + 1], cache=singles[r].clone()) for i, r in enumerate(rows)])
        torch.testing.assert_close(model(new, cache=some), want, **CLOSE)


def test_a_cloned_cache_is_independent():
    model = make("TM")
    with torch.no_grad():
        cache = model.new_cache()
        model(ids_of((1, 7)), cache=cache)
        twin = cache.clone()
        a, b = ids_of((1, 5), 2), ids_of((1, 5), 3)
        model(a, cache=cache)
        got = model(b, cache=twin)
        want = model(torch.cat([ids_of((1, 7)), b], 1))[:, 7:]
    torch.testing.assert_close(got, want, **CLOSE)
    assert cache.length == twin.length == 12


def test_an_attention_cache_truncates_and_a_recurrent_one_refuses():
    model = make("TT")
    with torch.no_grad():
        cache = model.new_cache()
        want = model(ids_of((1, 9)), cache=cache)[:, 5:]
        cache.truncate(5)
        torch.testing.assert_close(model(ids_of((1, 9))[:, 5:], cache=cache), want, **CLOSE)
    with pytest.raises(ValueError, match="truncated"):
        make("TM").new_cache().truncate(0)


def test_kv_grows_by_doubling_and_keeps_what_it_has():
    empty = torch.empty(1, 1, 0, 4)
    state = KVState(empty, empty)
    rows = torch.randn(1, 1, 300, 4)
    for t in range(300):
        k, v = state.append(rows[:, :, t : t + 1], -rows[:, :, t : t + 1], t)
    torch.testing.assert_close(k, rows)
    torch.testing.assert_close(v, -rows)
    assert state.k.size(2) == 512


@pytest.mark.parametrize("positions", [1, 50, 2 * _HeadLoss.CHUNK + 3])
def test_the_chunked_loss_and_its_gradients_are_those_of_cross_entropy(positions):
    torch.manual_seed(0)
    hidden = torch.randn(positions, C, requires_grad=True)
    weight = torch.randn(V, C, requires_grad=True)
    targets = torch.randint(0, V, (positions,))
    loss = head_loss(hidden, weight, targets)
    got = torch.autograd.grad(loss * 0.5, (hidden, weight))
    reference = F.cross_entropy(hidden @ weight.t(), targets, reduction="sum")
    want = torch.autograd.grad(reference * 0.5, (hidden, weight))
    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=1e-4)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hopeless_target_costs_what_it_costs(dtype, kernels, monkeypatch):
    if not kernels:
        monkeypatch.setattr(attention, "usable", lambda *tensors: False)
    weight = torch.zeros(V, C)
    weight[0, 0], weight[1, 0] = 1, -1
    hidden = torch.zeros(3, C)
    hidden[:, 0] = torch.tensor([20.0, 60.0, 200.0])
    loss = head_loss(hidden.to(dtype), weight, torch.ones(3, dtype=torch.long))
    assert loss.item() == pytest.approx(40 + 120 + 400, rel=1e-2 if dtype == torch.bfloat16 else 1e-5)  # 8 bits of 40


def test_a_frozen_head_still_passes_gradients_on():
    model = make("T")
    model.lm_head.weight.requires_grad_(False)
    x = torch.randn(1, 5, C, requires_grad=True)
    model(inputs_embeds=x, targets=ids_of((1, 5))).backward()
    assert x.grad.abs().sum() > 0 and model.lm_head.weight.grad is None


def test_targets_of_minus_one_are_ignored():
    model = make("MT")
    ids, targets = ids_of((2, 12)), ids_of((2, 12), 5)
    targets[0, :8] = -1
    targets[1, 3:] = -1
    loss = model(ids, targets)
    want = F.cross_entropy(model(ids).view(-1, V), targets.view(-1), ignore_index=-1)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-5)
    n = int((targets != -1).sum())
    torch.testing.assert_close(model(ids, targets, reduction="sum"), want * n, rtol=1e-5, atol=1e-4)


def test_a_batch_without_targets_has_loss_zero_and_finite_gradients():
    model = make("MT")
    loss = model(ids_of((1, 6)), torch.full((1, 6), -1))
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("pattern", ["T", "M", "MTM"])
def test_bf16_is_close_to_fp32(pattern):
    ids, targets = ids_of((2, 40)), ids_of((2, 40), 2)
    full, half = make(pattern), make(pattern, dtype=torch.bfloat16)
    with torch.no_grad():
        a, b = full(ids), half(ids)
        # bf16 has 8 bits: 0.4 % a rounding, a dozen of them in a row
        assert b.dtype == torch.float32 and (a - b).norm() / a.norm() < 0.03
        torch.testing.assert_close(half(ids, targets), full(ids, targets), rtol=0.01, atol=0.01)
        for p in half.parameters():  # cast once, as for inference
            if p.ndim >= 2:
                p.data = p.data.to(torch.bfloat16)
        assert (a - half(ids)).norm() / a.norm() < 0.03


@pytest.mark.parametrize("pattern", ["TT", "MM", "MT"])
def test_gradient_checkpointing_gives_equal_gradients(pattern):
    ids, targets = ids_of((2, 20)), ids_of((2, 20), 2)
    grads = []
    for on in (False, True):
        model = make(pattern)
        model.gradient_checkpointing = on
        model.train()
        model(ids, targets).backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_gradient_checkpointing_leaves_the_cache_alone():
    model = make("TM").train()
    model.gradient_checkpointing = True
    cache = model.new_cache()
    with torch.no_grad():
        model(ids_of((1, 5)), cache=cache)
        got = model(ids_of((1, 4), 2), cache=cache)
        want = model(torch.cat([ids_of((1, 5)), ids_of((1, 4), 2)], 1))[:, 5:]
    torch.testing.assert_close(got, want, **CLOSE)


def test_embeddings_in_place_of_ids_give_the_same():
    model = make("TM")
    ids = ids_of((2, 10))
    assert torch.equal(model(inputs_embeds=model.embed(ids)), model(ids))
    hidden = model.forward_embed_only(ids)
    assert hidden.shape == (2, 10, C)
    assert torch.equal(model.logits(hidden), model(ids))


def test_at_initialisation_every_token_is_as_likely_as_any_other():
    model = GPT(GPTConfig.from_depth(3, "hybrid", vocab_size=V))
    model.init_weights()
    loss = model(ids_of((2, 20)), ids_of((2, 20), 2))
    assert abs(loss.item() - math.log(V)) < 0.05


@pytest.mark.parametrize("pattern", ["gpt", "hybrid", "mamba"])
def test_a_few_steps_learn_a_sequence(pattern):
    torch.manual_seed(0)
    model = GPT(GPTConfig.from_depth(3, pattern, vocab_size=V, n_embd=64))
    model.init_weights()
    ids = ids_of((2, 33))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(40):
        loss = model(ids[:, :-1], ids[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * math.log(V)


def test_param_groups_hold_every_parameter_once():
    model = make("MTM")
    groups = model.param_groups(0.02, 0.3, 0.004, 0.01, 0.1)
    params = [p for g in groups for p in g["params"]]
    assert len(params) == len({id(p) for p in params}) == len(list(model.parameters()))
    matrices = next(g for g in groups if g["kind"] == "muon")
    assert all(p.ndim == 2 for p in matrices["params"])
    for g in groups:
        assert g["kind"] == "muon" or g["weight_decay"] == 0


def test_config_survives_json_and_patterns_are_expanded():
    config = GPTConfig(n_layer=6, block_pattern="M2,T,M2,T")
    assert config.block_pattern == "MMTMMT" and GPTConfig(**config_dict(config)) == config
    assert GPTConfig.from_depth(6, "hybrid", vocab_size=V).block_pattern == "MMTMMT"
    assert GPTConfig.from_depth(4, "T,T,M,M", vocab_size=V).block_pattern == "TTMM"


@pytest.mark.parametrize("bad", ["TT", "TTTTTTT", "TXTTTT", "T0M6", "T6,", "", "6T", "T-6"])
def test_a_pattern_that_isnt_one_or_has_another_depth_is_refused(bad):
    if bad == "T6,":  # a trailing comma is harmless
        assert GPTConfig(block_pattern=bad).block_pattern == "TTTTTT"
        return
    with pytest.raises(UserError, match="block pattern"):
        GPTConfig(n_layer=6, block_pattern=bad)


def test_sizes_that_dont_divide_are_refused():
    for bad in ({"n_embd": 250}, {"n_head": 3}, {"n_kv_head": 3}, {"headdim": 48}, {"n_embd": "a"}, {"d_state": 0}):
        with pytest.raises(UserError):
            GPTConfig(**bad)
    with pytest.raises(UserError, match="depth"):
        GPTConfig.from_depth(0, vocab_size=V)


@pytest.mark.parametrize("depth", [1, 2])
def test_a_hybrid_too_shallow_to_attend_is_refused(depth):
    with pytest.raises(UserError, match="needs a depth of 3 or more"):
        GPTConfig.from_depth(depth, "hybrid", vocab_size=V)
    assert GPTConfig.from_depth(depth, "mamba", vocab_size=V).block_pattern == "M" * depth
