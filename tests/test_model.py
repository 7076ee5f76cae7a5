"""The model: attention against an explicit mask, the network against its formulas by hand."""

import copy
import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import CPU

import prepare
import train

CONFIG = train.GPTConfig(vocab_size=50, seq_len=24, n_layer=4, n_head=2, n_kv_head=2, n_embd=64,
                         windows=(5, 24, 24, 5))  # each window with a value embedding and without


def visible_keys(T, window):
    return [[max(0, t - window) <= s <= t for s in range(T)] for t in range(T)]


def explicit_attention(q, k, v, window):
    """The oracle: query t sees keys max(0, t - window) ... t, head h reads kv head h // (H / Hkv)."""
    T, group = q.size(1), q.size(2) // k.size(2)
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    visible = torch.tensor(visible_keys(T, window), device=q.device)
    scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(q.size(-1))
    weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
    return torch.einsum("bhts,bshd->bthd", weights, v)


def windows_of(T):
    return {max(w, 0) for w in (0, 1, T // 3, T - 2, T - 1, T, 10 * T)}


def random_qkv(B, T, H, Hkv, D, device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, T, H, D), (B, T, Hkv, D), (B, T, Hkv, D))
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]


def largest_error(backend, q, k, v, window):
    """Largest error of y, dq, dk and dv of a backend at a position, over the longest one's norm."""
    dy = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(q)
    y = backend(q, k, v, window)
    assert (y.shape, y.dtype) == (q.shape, q.dtype)
    seen = [y, *torch.autograd.grad(y, (q, k, v), dy)]
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    y = explicit_attention(*exact, window)
    expected = [y, *torch.autograd.grad(y, exact, dy.double())]
    # a zero gradient (window 0 gives the weights no freedom) is compared with the size of dy
    return max(((a - b).norm(dim=-1).max() / b.norm(dim=-1).max().clamp_min(1.0)).item()
               for a, b in zip(seen, expected))


def assert_visible_keys(backend, T, D, window, device="cpu", dtype=torch.float32):
    """Equal scores and one-hot values make the output the attention weights, dv those transposed."""
    H = math.ceil(T / D)  # a head has D columns of the weights
    one_hot = torch.eye(T, H * D).view(1, T, H, D).to(device, dtype)
    q, v = torch.zeros_like(one_hot), one_hot.clone().requires_grad_()
    y = backend(q, q, v, window)
    dv = torch.autograd.grad(y, v, one_hot)[0]
    forward, backward = ((weights.flatten(2)[0, :, :T] > 0) for weights in (y, dv))
    assert forward.tolist() == backward.T.tolist() == visible_keys(T, window)


@pytest.mark.parametrize("Hkv", [4, 2, 1])
@pytest.mark.parametrize("T", [1, 7, 33])
def test_sdpa_agrees_with_an_explicit_mask_and_sees_its_window_and_nothing_else(T, Hkv):
    for window in windows_of(T):
        error = largest_error(train.attention_sdpa, *random_qkv(2, T, 4, Hkv, 16), window)
        assert error < 1e-5, window  # float32 against float64: a handful of roundings
        assert_visible_keys(train.attention_sdpa, T, 16, window)


@pytest.mark.cuda
@pytest.mark.parametrize("Hkv", [4, 2])
@pytest.mark.parametrize("T", [65, 193, 1000])  # less than, more than, many blocks of a kernel
@pytest.mark.parametrize("name", ["varlen", "fa3", "sdpa"])
def test_gpu_backends_agree_with_an_explicit_mask_and_see_their_window(name, T, Hkv):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    chosen, reason = train.choose_attention(torch.device("cuda"), name)
    if chosen != name:
        pytest.skip(reason)
    for window, D in itertools.product(windows_of(T), (64, 128)):
        qkv = random_qkv(2, T, 4, Hkv, D, "cuda", torch.bfloat16)
        error = largest_error(train.attention, *qkv, window)
        print(f"{name} T {T} H 4 Hkv {Hkv} D {D} window {window}: {error:.5f}")
        assert error < 0.02, (window, D)  # bfloat16 rounds by 2**-9, several times
        if D == 64 and T < 1000:
            assert_visible_keys(train.attention, T, D, window, "cuda", torch.bfloat16)


@pytest.mark.parametrize("pattern, n_layer, short, expected", [
    ("L", 3, 16, (64, 64, 64)), ("S", 3, 16, (16, 16, 64)), ("SSL", 5, 16, (16, 16, 64, 16, 64)),
    ("SL", 1, 16, (64,)), ("SL", 3, 256, (64, 64, 64)),
])
def test_the_window_pattern_is_tiled_the_last_layer_sees_all_and_other_letters_are_named(
        pattern, n_layer, short, expected):
    assert train.window_sizes(pattern, n_layer, short, 64) == expected
    for wrong in ("", pattern + "X", pattern.lower(), f" {pattern}"):
        with pytest.raises(prepare.Failure, match=f"^WINDOW_PATTERN is {wrong!r}; it takes S and"):
            train.window_sizes(wrong, n_layer, short, 64)


def test_width_kv_heads_and_value_embeddings_follow_from_the_knobs(monkeypatch):
    alternate = [[0], [1], [0, 2, 4], [1, 3, 5]]
    assert [[i for i in range(n) if train.has_ve(i, n)] for n in (1, 2, 5, 6)] == alternate
    for *size, width in (8, 64, 128, 512), (9, 71, 128, 640), (1, 1, 64, 64), (3, 128, 64, 384):  # whole heads
        for name, value in zip(("DEPTH", "ASPECT_RATIO", "HEAD_DIM"), size):
            monkeypatch.setattr(train, name, value)
        assert train.sizes("cpu", 32, 50)[0].n_embd == width
    for heads_per_kv_head, n_kv_head in ((1, 6), (2, 3), (6, 1)):
        monkeypatch.setattr(train, "HEADS_PER_KV_HEAD", heads_per_kv_head)
        assert train.sizes("cpu", 32, 50)[0].n_kv_head == n_kv_head


def built(config=CONFIG, seed=0, **changes):
    """A float32 model on the CPU whose zero parameters are random too, so that every path counts."""
    model, _ = train.build(dataclasses.replace(config, **changes), CPU, torch.float32, False, seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.3)
    return model


def some_tokens(B=3, T=24, seed=0):
    return torch.randint(CONFIG.vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


def by_hand(model, idx):
    """The oracle: the whole network, float32, written from its description."""
    def rms(x):
        return x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()

    def late(x):  # the last channels come from the position before, and the first position has none
        own = torch.arange(config.n_embd) < config.n_embd - config.shifted
        return torch.where(own, x, F.pad(x, (0, 0, 1, 0))[:, :-1])

    B, T = idx.shape
    config, weights = model.config, dict(model.named_parameters())
    D = config.n_embd // config.n_head
    embedded = weights["wte.weight"][idx]
    if config.bigram_rows:
        rows, triples = (train.ngram_hash(idx, n, config.bigram_rows) for n in (2, 3))
        table = weights["ngrams.weight"]
        embedded = embedded + torch.cat([table[rows], table[config.bigram_rows + triples]], -1)
    x = x0 = rms(embedded)
    pair = torch.arange(D // 2)
    speed = torch.where(pair < D // 4, train.ROPE_BASE ** -(pair / (D // 4)), 0)
    turn = torch.polar(torch.ones(()), -torch.arange(T)[:, None] * speed)[None, :, None, :]

    def rope(x):
        turned = torch.complex(x[..., : D // 2], x[..., D // 2 :]) * turn
        return torch.cat([turned.real, turned.imag], -1)

    for i, window in enumerate(config.windows):
        x = weights["resid_lambdas"][i] * x + weights["x0_lambdas"][i] * x0
        layer = dict(model.h[i].named_parameters())
        y = late(rms(x))
        q, k, v = ((y @ layer[f"attn.c_{name}.weight"].T).view(B, T, -1, D) for name in "qkv")
        first = y[..., : train.GATE_CHANNELS]
        if i in (1, 3):  # of four
            gate = 2 * torch.sigmoid(first @ layer["attn.ve_gate.weight"].T)
            ve = weights[f"value_embeds.{i // 2}.weight"][idx]
            if config.bigram_rows:
                ve = ve + weights["bigram_value_embeds.weight"][rows]
            v = v + gate[..., None] * ve.view(B, T, -1, D)
        q, k = train.Q_SCALE * rms(q), rms(k)
        if window == config.seq_len:  # what does not turn comes from the position before
            still = (pair >= D // 4).repeat(2)
            k = torch.where(still, k[:, (torch.arange(T) - 1).clamp_min(0)], k)
        y = explicit_attention(rope(q), rope(k), v, window)
        y = 2 * torch.sigmoid(first @ layer["attn.attn_gate.weight"].T)[..., None] * y
        x = x + y.reshape(B, T, -1) @ layer["attn.c_proj.weight"].T
        hidden = late(rms(x)) @ layer["mlp.c_fc.weight"].T
        hidden = torch.where(hidden > 0, hidden, hidden / 2) ** 2
        x = x + hidden @ layer["mlp.c_proj.weight"].T
    logits = rms(x) @ weights["lm_head.weight"].T
    return train.SOFTCAP * torch.tanh(logits / train.SOFTCAP)


def test_a_compiled_model_is_the_plain_one_and_more_layers_compile_no_more(compilations):
    idx, plain, compiled = some_tokens(), [], []
    for windows in (CONFIG.windows, CONFIG.windows * 3):
        model = built(n_layer=len(windows), windows=windows, bigram_rows=1000)
        gradients = torch.autograd.grad(model(idx, idx), list(model.parameters()))
        plain.append((model, model(idx), gradients))
    train.compile_parts()
    for model, logits, gradients in plain:
        torch._dynamo.reset()
        compilations.clear()
        torch.testing.assert_close(model(idx), logits)
        seen = torch.autograd.grad(model(idx, idx), list(model.parameters()))
        torch.testing.assert_close(seen, gradients)
        with torch.no_grad():  # as the exam does
            torch.testing.assert_close(model.eval()(idx), logits)
            compiled.append(compilations.frame_count)
            model(some_tokens(seed=1))
        model.train()(idx, idx)
        assert compilations.frame_count == compiled[-1]  # neither a second batch nor more training
    assert compiled[0] == compiled[1] > 0
    twin = built(n_layer=len(windows), windows=windows, bigram_rows=1000)  # as after warm-up
    twin(idx, idx).backward()
    assert compilations.frame_count == compiled[-1]
    average = copy.deepcopy(model)  # has weights of its own
    torch.nn.init.zeros_(average.lm_head.weight)
    assert model(idx).any() and not average(idx).any()


def test_what_works_in_place_between_blocks_is_scored_with_the_forward_pass_that_the_exam_runs(monkeypatch):
    def adds(block, given):
        given[0].add_(1.0)

    model = built().eval()
    assert torch.autograd.grad(model(some_tokens()).sum(), model.wte.weight, allow_unused=True) == (None,)
    model.h[1].register_forward_pre_hook(adds)
    with torch.no_grad():
        expected = model(some_tokens())
        monkeypatch.setattr(train.GPT, "forward", torch.enable_grad()(train.GPT.forward))  # as compile_parts does
        torch.testing.assert_close(model(some_tokens()), expected)


@pytest.mark.parametrize("bigram_rows, n_kv_head, shifted", [(0, 2, 0), (1000, 2, 40), (1000, 1, 64)])
def test_the_network_is_the_one_of_its_description(bigram_rows, n_kv_head, shifted):
    model, idx = built(bigram_rows=bigram_rows, n_kv_head=n_kv_head, shifted=shifted), some_tokens()
    torch.testing.assert_close(model(idx), by_hand(model, idx), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(idx[:, :11]), model(idx)[:, :11])  # nothing later counts
    parameters = list(model.parameters())
    seen = torch.autograd.grad(model(idx).square().mean(), parameters)
    expected = torch.autograd.grad(by_hand(model, idx).square().mean(), parameters)
    for (name, _), a, b in zip(model.named_parameters(), seen, expected):
        assert b.any() and (a.to_dense() - b).norm() <= 1e-3 * b.norm(), name


@pytest.mark.parametrize("weight", [0.0, 0.5])  # of the token after the next
@pytest.mark.parametrize("scale", [1, 1e3, 1e5])  # logits far from the cap, near it, and all at it
def test_logits_are_soft_capped_and_the_loss_is_their_cross_entropy(scale, weight):
    """Oracle: torch's cross_entropy of the logits in float64; float32 rounding lies between."""
    model, idx, targets = built(), some_tokens(), some_tokens(seed=1)
    with torch.no_grad():
        model.mtp_weight.fill_(weight)
        model.lm_head.weight.mul_(scale)
    logits = model(idx)
    assert logits.shape == (3, 24, 50) and logits.dtype == torch.float32
    assert (logits.abs().max() == train.SOFTCAP) == (scale == 1e5) and logits.abs().max() <= train.SOFTCAP
    if scale < 1e5:  # where rounding moves no sign
        torch.testing.assert_close(logits, by_hand(model, idx), rtol=1e-4, atol=1e-4)
    double = logits.double().transpose(1, 2)  # (B, V, T)
    after = F.cross_entropy(double[..., :-1], targets[:, 1:], reduction="sum")
    expected = F.cross_entropy(double, targets, reduction="sum") + weight * after
    expected = expected / (3 * 24 + weight * 3 * 23)  # a weighted mean
    seen = model(idx, targets)
    assert seen.shape == ()
    torch.testing.assert_close(seen.double(), expected, rtol=1e-6, atol=0)
    weights = [model.lm_head.weight, model.wte.weight]
    for a, b in zip(torch.autograd.grad(seen, weights), torch.autograd.grad(expected, weights)):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * b.abs().max().item())


def test_a_model_left_in_eval_mode_still_trains_all_its_weights():
    model = built(bigram_rows=1000).eval()
    model(some_tokens(), some_tokens(seed=1)).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("n", [2, 3])
def test_the_hash_of_n_tokens_is_a_function_of_just_those_and_spreads_them(n):
    idx = some_tokens(40, 200) % 8
    rows = train.ngram_hash(idx, n, 997)
    assert rows.dtype == torch.int64 and rows.min() >= 0 and rows.max() < 997
    tables = built(bigram_rows=997)
    assert [len(t.weight) for t in (tables.ngrams, tables.bigram_value_embeds)] == [2 * 997 + 1, 998]  # a spare row
    padded, of_tokens = F.pad(idx, (n - 1, 0)), {}
    for *tokens, row in torch.cat([padded.unfold(1, n, 1), rows[..., None]], -1).flatten(0, 1).tolist():
        assert of_tokens.setdefault(tuple(tokens), row) == row
    for length in range(1, n + 1):  # a text's first tokens too
        assert train.ngram_hash(idx[:, :length], n, 997).equal(rows[:, :length])
    tokens = torch.cartesian_prod(*[torch.arange(100 if n == 2 else 22)] * n)
    counts = train.ngram_hash(tokens, n, 997)[:, -1].bincount(minlength=997)
    assert counts.max() < 4 * 10_000 / 997  # four times an even spread


def test_what_init_weights_does_not_know_stays_as_its_module_made_it(monkeypatch):
    class Block(train.Block):
        def __init__(self, config, layer):
            super().__init__(config, layer)
            self.gain, self.wte2 = torch.nn.RMSNorm(64), torch.nn.Linear(64, 64)
            self.scale = torch.nn.Parameter(torch.tensor(0.5))
            self.register_buffer("table", torch.arange(3.0))

    plain = built()
    monkeypatch.setattr(train, "Block", Block)
    model = built()
    block = model.h[2]
    assert model.wte.weight.equal(plain.wte.weight)  # what a new part draws moves no other's weights
    assert block.gain.weight.eq(1).all() and block.scale == 0.5
    assert block.table.tolist() == [0, 1, 2]
    for parameter in block.wte2.parameters():  # a name like another's is another name
        assert 0 < parameter.abs().max() <= 1 / 8  # 1 / sqrt(64), torch's bound of a Linear


def test_init_weights_draws_each_kind_from_its_own_distribution():
    config = dataclasses.replace(CONFIG, bigram_rows=1000)
    model, _ = train.build(config, CPU, torch.float32, False, 0)
    bound = (3 / CONFIG.n_embd) ** 0.5
    uniforms = ("c_q", "c_k", "c_v", "c_fc", "value_embeds")
    expected = {  # mean, standard deviation
        "wte": (0, 1), "lm_head": (0, 0.001), "resid_lambdas": (1, 0), "x0_lambdas": (train.X0_INIT, 0),
        **dict.fromkeys(uniforms, (0, bound / 3**0.5)),
        **dict.fromkeys(("c_proj", "ve_gate", "attn_gate", "ngrams", "bigram_value_embeds"), (0, 0)),
    }
    seen = set()
    for name, p in model.named_parameters():  # within five standard errors
        *_, kind = (part for part in name.split(".") if part != "weight" and not part.isdigit())
        mean, deviation = expected[kind]
        seen.add(kind)
        error = 5 / p.numel() ** 0.5
        assert p.mean().item() == pytest.approx(mean, abs=error * deviation + 1e-7), name
        assert p.std().item() == pytest.approx(deviation, rel=error), name
        assert kind not in uniforms or p.abs().max() <= bound, name
    assert seen == expected.keys()
    loss = model(some_tokens(), some_tokens(seed=1))
    assert abs(loss.item() - math.log(50)) < 0.02  # it begins by knowing nothing


def test_flops_per_token_count_matrices_and_visible_keys():
    model = built()
    layers, gates, lm_head = 4 * 12 * 64 * 64, (2 + 4) * 2 * train.GATE_CHANNELS, 50 * 64
    expected = 6 * (layers + gates + lm_head) + 12 * 64 * (6 + 24 + 24 + 6)
    assert model.flops_per_token() == expected
