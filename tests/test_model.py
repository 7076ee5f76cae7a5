"""The model: attention backends against an explicit mask, and the network's formulas against hand computations."""

import copy
import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import prepare
import train

CONFIG = train.GPTConfig(vocab_size=50, seq_len=24, n_layer=4, n_head=2, n_kv_head=2, n_embd=64, windows=(5, 24, 5, 24))


@pytest.fixture(autouse=True)
def same_numbers():
    torch.manual_seed(0)


def explicit_attention(q, k, v, window):
    """The oracle, float64: query t sees keys max(0, t - window) ... t; query head h reads kv head h // (H / Hkv)."""
    T, group = q.size(1), q.size(2) // k.size(2)
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    visible = torch.tensor([[max(0, t - window) <= s <= t for s in range(T)] for t in range(T)], device=q.device)
    scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(q.size(-1))
    weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
    return torch.einsum("bhts,bshd->bthd", weights, v)


def windows_of(T):
    return sorted({w for w in (0, 1, T // 3, T - 2, T - 1, T, 10 * T) if w >= 0})


def random_qkv(B, T, H, Hkv, D, device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, T, H, D), (B, T, Hkv, D), (B, T, Hkv, D))
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]


def largest_error(backend, q, k, v, window):
    """Largest relative error of y, dq, dk and dv of a backend: a position's error over the longest position's norm."""
    dy = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(q)
    y = backend(q, k, v, window)
    assert (y.shape, y.dtype) == (q.shape, q.dtype)
    seen = [y, *torch.autograd.grad(y, (q, k, v), dy)]
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    y = explicit_attention(*exact, window)
    expected = [y, *torch.autograd.grad(y, exact, dy.double())]
    # a zero gradient (window 0 gives the weights no freedom) is compared with the size of dy
    return max(((a - b).norm(dim=-1).max() / max(b.norm(dim=-1).max(), 1.0)).item() for a, b in zip(seen, expected))


def assert_visible_keys(backend, T, D, window, device="cpu", dtype=torch.float32):
    """Equal scores and one-hot values make the output the attention weights themselves, and dv those transposed."""
    q = torch.zeros(1, T, 2, D, device=device, dtype=dtype)
    forward, backward = [], []
    for start in range(0, T, D):  # D columns at a time
        one_hot = F.pad(torch.eye(T), (0, D))[:, start : start + D].to(q)[None, :, None].expand_as(q).contiguous()
        v = one_hot.clone().requires_grad_()
        y = backend(q, q, v, window)
        forward.append(y[0, :, 0] > 0)
        backward.append(torch.autograd.grad(y, v, one_hot)[0][0, :, 0] > 0)
    expected = [[max(0, t - window) <= s <= t for s in range(T)] for t in range(T)]
    assert torch.cat(forward, 1)[:, :T].tolist() == expected
    assert torch.cat(backward, 1)[:, :T].T.tolist() == expected


@pytest.mark.parametrize("Hkv", [4, 2, 1])
@pytest.mark.parametrize("T", [1, 7, 33])
def test_sdpa_agrees_with_an_explicit_mask_forward_and_backward(T, Hkv):
    for window in windows_of(T):
        # float32 against float64: a handful of roundings
        assert largest_error(train.attention_sdpa, *random_qkv(2, T, 4, Hkv, 16), window) < 1e-5, window


@pytest.mark.parametrize("T", [1, 7, 33])
def test_sdpa_sees_its_window_and_nothing_else(T):
    for window in windows_of(T):
        assert_visible_keys(train.attention_sdpa, T, 16, window)


def gpu_backend(name):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    chosen, reason = train.choose_attention(torch.device("cuda"), name)
    if chosen != name:
        pytest.skip(reason)
    return train.attention


@pytest.mark.cuda
@pytest.mark.parametrize("Hkv", [4, 2])
@pytest.mark.parametrize("T", [65, 193, 1000])  # less than, more than, many blocks of a kernel; none a multiple of one
@pytest.mark.parametrize("name", ["varlen", "fa3", "sdpa"])
def test_gpu_backends_agree_with_an_explicit_mask_forward_and_backward(name, T, Hkv):
    backend = gpu_backend(name)
    for window, D in itertools.product(windows_of(T), (64, 128)):
        # bfloat16 keeps 8 bits: the output alone rounds by 2**-9, weights and gradients several times
        error = largest_error(backend, *random_qkv(2, T, 4, Hkv, D, "cuda", torch.bfloat16), window)
        print(f"{name} T {T} H 4 Hkv {Hkv} D {D} window {window}: {error:.5f}")
        assert error < 0.02, (window, D)


@pytest.mark.cuda
@pytest.mark.parametrize("T", [65, 193, 300])
@pytest.mark.parametrize("name", ["varlen", "fa3", "sdpa"])
def test_gpu_backends_see_their_window_and_nothing_else(name, T):
    backend = gpu_backend(name)
    for window in windows_of(T):
        assert_visible_keys(backend, T, 64, window, "cuda", torch.bfloat16)


def test_rope_keeps_norms_and_scores_depend_on_relative_positions_only():
    q, k = (torch.randn(1, 1, 1, 32, dtype=torch.float64).expand(1, 40, 1, 32) for _ in range(2))
    cos, sin = (table.double() for table in train.rotary(40, 32, 10_000))
    a, b = train.rotate(q, cos, sin), train.rotate(k, cos, sin)
    torch.testing.assert_close(a.norm(dim=-1), q.norm(dim=-1), rtol=1e-6, atol=0)  # cos and sin are float32 numbers
    scores = torch.einsum("bthd,bshd->ts", a, b)
    for offset in range(-39, 40):
        diagonal = scores.diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-4)
    assert scores[0].std() > 0.1  # and they do depend on those
    torch.testing.assert_close(a[:, 0], q[:, 0])  # position 0 does not turn


def test_rope_turns_each_pair_by_its_own_angle():
    """Oracle: multiplication by exp(-i t base**(-2 d / D)) of x[d] + i x[d + D/2]."""
    x = torch.randn(2, 9, 3, 8)
    angles = torch.arange(9)[:, None] * 100.0 ** -(torch.arange(4) / 4)
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones(()), -angles)[None, :, None, :]
    torch.testing.assert_close(train.rotate(x, *train.rotary(9, 8, 100)), torch.cat([turned.real, turned.imag], -1))


def test_qk_norm_before_rope_is_the_same_function_as_after():
    x = torch.randn(2, 9, 3, 32)
    cos, sin = train.rotary(9, 32, train.ROPE_BASE)
    torch.testing.assert_close(train.rotate(train.norm(x), cos, sin), train.norm(train.rotate(x, cos, sin)))


@pytest.mark.parametrize("pattern, n_layer, expected", [
    ("L", 3, (64, 64, 64)), ("S", 3, (16, 16, 64)), ("SSL", 5, (16, 16, 64, 16, 64)), ("SL", 1, (64,)),
])
def test_the_window_pattern_is_tiled_and_the_last_layer_sees_all(pattern, n_layer, expected):
    assert train.window_sizes(pattern, n_layer, 16, 64) == expected


def test_a_short_window_is_never_longer_than_the_context():
    assert train.window_sizes("SL", 3, 256, 64) == (64, 64, 64)


@pytest.mark.parametrize("pattern", ["", "SSX", "sl", "S L"])
def test_a_window_pattern_of_other_letters_is_named(pattern):
    with pytest.raises(prepare.Failure, match="WINDOW_PATTERN") as raised:
        train.window_sizes(pattern, 4, 16, 64)
    assert repr(pattern) in str(raised.value)


def test_the_width_is_depth_times_aspect_ratio_rounded_up_to_whole_heads():
    assert [train.model_width(*arguments) for arguments in ((8, 64, 128), (9, 71, 128), (1, 1, 64), (3, 64, 64))] == [
        512, 640, 64, 192]


@pytest.mark.parametrize("n_layer", range(1, 8))
def test_value_embeddings_alternate_and_the_last_layer_has_one(n_layer):
    layers = [layer for layer in range(n_layer) if train.has_value_embedding(layer, n_layer)]
    assert layers[-1] == n_layer - 1 and all(b - a == 2 for a, b in itertools.pairwise(layers)) and layers[0] <= 1


def built(config=CONFIG, seed=0, **changes):
    """A float32 model on the CPU whose zero-initialised parameters are random too, so that every path counts."""
    train.choose_attention(torch.device("cpu"))
    model, _ = train.build(dataclasses.replace(config, **changes), torch.device("cpu"), torch.float32, False, seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.3)
    return model


def some_tokens(B=3, T=24, seed=0):
    return torch.randint(CONFIG.vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


def test_the_value_residual_is_gated_per_kv_head_and_its_gate_starts_at_1():
    attn = train.CausalSelfAttention(CONFIG, layer=3)
    x, ve = torch.randn(2, 7, 64), torch.randn(2, 7, 64)
    plain = attn.c_v(x)
    with torch.no_grad():
        attn.ve_gate.weight.zero_()  # as init_weights leaves it
    rope = train.rotary(7, 32, 10_000)
    torch.testing.assert_close(attn.qkv(x, ve, *rope)[2].flatten(2), plain + ve)
    torch.testing.assert_close(attn.qkv(x, None, *rope)[2].flatten(2), plain)
    torch.nn.init.normal_(attn.ve_gate.weight)
    gate = 2 / (1 + torch.exp(-(x[..., : train.GATE_CHANNELS] @ attn.ve_gate.weight.T)))  # (B, T, Hkv)
    by_hand = torch.cat([plain[..., :32] + gate[..., :1] * ve[..., :32],
                         plain[..., 32:] + gate[..., 1:] * ve[..., 32:]], dim=-1)
    torch.testing.assert_close(attn.qkv(x, ve, *rope)[2].flatten(2), by_hand)


def by_hand(model, idx):
    """The oracle: the whole network, float32, written from its description."""
    def rms(x):
        return x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()

    B, T = idx.shape
    config, weights = model.config, dict(model.named_parameters())
    H, D = config.n_head, config.n_embd // config.n_head
    rows = train.bigram_hash(idx, config.bigram_rows) if config.bigram_rows else None
    x = x0 = rms(weights["wte.weight"][idx] + (0 if rows is None else weights["bigram.weight"][rows]))
    angles = torch.arange(T)[:, None] * train.ROPE_BASE ** -(torch.arange(D // 2) / (D // 2))
    turn = torch.polar(torch.ones(()), -angles)[None, :, None, :]

    def rope(x):
        turned = torch.complex(x[..., : D // 2], x[..., D // 2 :]) * turn
        return rms(torch.cat([turned.real, turned.imag], -1))

    for i, window in enumerate(config.windows):
        x = weights["resid_lambdas"][i] * x + weights["x0_lambdas"][i] * x0
        layer = {name.removeprefix(f"h.{i}."): w for name, w in weights.items() if name.startswith(f"h.{i}.")}
        y = rms(x)
        q, k, v = ((y @ layer[f"attn.c_{name}.weight"].T).view(B, T, H, D) for name in "qkv")
        first = y[..., : train.GATE_CHANNELS]
        if i in (1, 3):  # of four
            gate = 2 * torch.sigmoid(first @ layer["attn.ve_gate.weight"].T)
            ve = weights[f"value_embeds.{i // 2}.weight"][idx]
            if rows is not None:
                ve = ve + weights["bigram_values.weight"][rows]
            v = v + gate[..., None] * ve.view(B, T, H, D)
        y = explicit_attention(rope(q), rope(k), v, window)
        y = (y * 2 * torch.sigmoid(first @ layer["attn.attn_gate.weight"].T)[..., None]).reshape(B, T, -1)
        x = x + y @ layer["attn.c_proj.weight"].T
        x = x + (rms(x) @ layer["mlp.c_fc.weight"].T).clamp_min(0) ** 2 @ layer["mlp.c_proj.weight"].T
    logits = rms(x) @ weights["lm_head.weight"].T
    return train.SOFTCAP * torch.tanh(logits / train.SOFTCAP)


def test_a_compiled_model_is_the_plain_one_and_neither_more_layers_nor_the_exam_compile_more(compilations):
    idx, plain = some_tokens(), []
    for windows in ((5, 24, 5, 24), (5, 24, 24, 5, 5, 24) * 2):
        model = built(n_layer=len(windows), windows=windows, bigram_rows=1000)
        plain.append((model, model(idx), torch.autograd.grad(model(idx, idx), list(model.parameters()))))
    train.compile_parts()
    for model, logits, gradients in plain:
        torch._dynamo.reset()
        compilations.clear()
        torch.testing.assert_close(model(idx), logits)
        torch.testing.assert_close(torch.autograd.grad(model(idx, idx), list(model.parameters())), gradients)
        assert compilations.frame_count == 6  # embedding, head with and without targets, after attention, 2 before it
        with torch.no_grad():  # as the exam does
            seen = model.eval()(idx)
        torch.testing.assert_close(seen, logits)
        assert compilations.frame_count == 6
        assert torch.autograd.grad(seen.sum(), model.wte.weight, allow_unused=True) == (None,)  # no block kept a thing


def test_a_copy_of_a_compiled_model_has_weights_of_its_own(compilations):
    train.compile_parts()
    model = built()
    average = copy.deepcopy(model)
    torch.nn.init.zeros_(average.lm_head.weight)
    assert model(some_tokens()).all() and not average(some_tokens()).any()


@pytest.mark.parametrize("bigram_rows", [0, 1000])
def test_the_network_is_the_one_of_its_description_forward_and_backward(bigram_rows):
    model, idx = built(bigram_rows=bigram_rows), some_tokens()
    torch.testing.assert_close(model(idx), by_hand(model, idx), rtol=1e-4, atol=1e-4)
    parameters = list(model.parameters())
    seen = torch.autograd.grad(model(idx).square().mean(), parameters)
    expected = torch.autograd.grad(by_hand(model, idx).square().mean(), parameters)
    for (name, _), a, b in zip(model.named_parameters(), seen, expected):
        assert b.any() and (a - b).norm() <= 1e-3 * b.norm(), name


@pytest.mark.parametrize("scale", [1, 1e3, 1e5])  # logits far from the cap, near it, and all at it
def test_the_loss_is_the_cross_entropy_of_the_logits_forward_and_backward(scale):
    """Oracle: torch's cross_entropy of the logits in float64; float32 rounding lies between."""
    model, idx, targets = built(), some_tokens(), some_tokens(seed=1)
    with torch.no_grad():
        model.lm_head.weight.mul_(scale)
    logits = model(idx)
    assert logits.shape == (3, 24, 50) and logits.dtype == torch.float32
    expected = F.cross_entropy(logits.double().flatten(0, 1), targets.flatten())
    seen = model(idx, targets)
    assert seen.shape == ()
    torch.testing.assert_close(seen.double(), expected)
    gradients = (torch.autograd.grad(loss, [model.lm_head.weight, model.wte.weight]) for loss in (seen, expected))
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * b.abs().max().item())


def test_logits_are_soft_capped():
    model, idx = built(), some_tokens()
    small = model(idx)
    assert small.abs().max() < train.SOFTCAP
    with torch.no_grad():
        model.lm_head.weight.mul_(1e3)
    torch.testing.assert_close(model(idx), by_hand(model, idx), rtol=1e-4, atol=1e-4)  # bent, not cut
    with torch.no_grad():
        model.lm_head.weight.mul_(10)
    large = model(idx)
    assert large.abs().max() == train.SOFTCAP and torch.equal(large.sign(), small.sign())


def test_a_context_shorter_than_the_longest_gives_the_same_logits():
    model, idx = built(bigram_rows=1000), some_tokens()
    torch.testing.assert_close(model(idx[:, :11]), model(idx)[:, :11])


def test_later_tokens_change_no_earlier_logit():
    model, idx = built(bigram_rows=1000), some_tokens(B=1)
    changed = idx.repeat(23, 1)
    for cut in range(23):
        changed[cut, cut + 1 :] = (idx[0, cut + 1 :] + 1) % CONFIG.vocab_size
    moved = (model(changed) - model(idx)).abs().amax(-1)  # (cuts, T)
    assert moved.tril().max() < 1e-5  # float32 rounding: other shapes take other kernels
    assert moved.diagonal(1).min() > 1e-3


def test_the_bigram_hash_sees_a_token_and_the_one_before_it_and_spreads_their_pairs():
    idx = some_tokens(4, 200)
    rows = train.bigram_hash(idx, 997)
    assert rows.dtype == torch.int64 and rows.min() >= 0 and rows.max() < 997
    seen = {}
    for b, t in itertools.product(range(4), range(200)):
        pair = (idx[b, t - 1].item() if t else 0, idx[b, t].item())
        assert seen.setdefault(pair, rows[b, t].item()) == rows[b, t].item()  # a function of the pair
    pairs = torch.cartesian_prod(torch.arange(100), torch.arange(100))
    counts = train.bigram_hash(pairs, 997)[:, 1].bincount(minlength=997)
    assert counts.max() < 4 * 10_000 / 997  # four times an even spread


def test_init_weights_fills_every_parameter_of_a_model_built_on_the_meta_device():
    with torch.device("meta"):
        model = train.GPT(dataclasses.replace(CONFIG, bigram_rows=1000))
    assert all(t.is_meta for t in model.parameters())
    model.to_empty(device="cpu")
    with torch.no_grad():
        for t in model.parameters():
            t.fill_(math.nan)
    model.init_weights()
    assert all(t.isfinite().all() for t in model.parameters())
    train.choose_attention(torch.device("cpu"))
    loss = model(some_tokens(), some_tokens(seed=1))
    assert abs(loss.item() - math.log(50)) < 0.02  # it begins by knowing nothing


@pytest.mark.parametrize("name", ["extra", "wte2", "c_q_2"])  # a name like another's is another name
def test_a_parameter_that_init_weights_forgets_is_an_error_that_names_it(name):
    model = built()
    setattr(model.h[2], name, torch.nn.Linear(3, 3, bias=False))
    with pytest.raises(prepare.Failure, match=rf"uninitialised: h\.2\.{name}\.weight$"):
        model.init_weights()


def test_init_weights_draws_each_kind_from_its_own_distribution():
    model, _ = train.build(dataclasses.replace(CONFIG, bigram_rows=1000), torch.device("cpu"), torch.float32, False, 0)
    bound = train.INIT_SCALE * (3 / CONFIG.n_embd) ** 0.5
    uniform, seen = bound / 3**0.5, {}
    for name, parameter in model.named_parameters():
        kind = next(part for part in reversed(name.split(".")) if part != "weight" and not part.isdigit())
        seen.setdefault(kind, []).append(parameter.detach())
    expected = {  # mean, standard deviation
        "wte": (0, 1), "lm_head": (0, 0.001), "resid_lambdas": (1, 0), "x0_lambdas": (train.X0_INIT, 0),
        **dict.fromkeys(("c_q", "c_k", "c_v", "c_fc", "value_embeds"), (0, uniform)),
        **dict.fromkeys(("c_proj", "ve_gate", "attn_gate", "bigram", "bigram_values"), (0, 0)),
    }
    assert seen.keys() == expected.keys()
    for kind, (mean, deviation) in expected.items():
        for values in seen[kind]:  # within five standard errors
            assert values.mean().item() == pytest.approx(mean, abs=5 * deviation / values.numel() ** 0.5 + 1e-7), kind
            assert values.std().item() == pytest.approx(deviation, rel=5 / values.numel() ** 0.5), kind
            assert deviation != uniform or values.abs().max() <= bound, kind


def test_flops_per_token_count_matrices_and_visible_keys():
    model = built()
    matrices = 4 * 12 * 64 * 64 + (2 + 4) * 2 * train.GATE_CHANNELS + 50 * 64  # layers, gates, lm_head
    assert model.flops_per_token() == 6 * matrices + 12 * 64 * (6 + 24 + 6 + 24)
