"""The optimizer: both steps against independent derivations, the groups, the compilations, the schedules."""

import math

import numpy as np
import pytest
import torch

import prepare
import train

CONFIG = train.GPTConfig(vocab_size=50, seq_len=16, n_layer=4, n_head=2, n_kv_head=2, n_embd=64,
                         windows=(16,) * 4, bigram_rows=100)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def same_numbers():
    torch.manual_seed(0)


def scalars(**values):
    return {name: torch.tensor(float(value)) for name, value in values.items()}


def adamw_of(p, compiled):
    """A function (grad, options) that steps p: by torch's kernel on a CPU, or as a GPU does, where p is too small to
    be compiled."""
    p.requires_grad_()
    optimizer = train.MuonAdamW([{"kind": "adamw", "params": [p], "lr": 0.0}], compiled)

    def step(grad, **options):
        optimizer.param_groups[0].update(options)
        p.grad = grad
        optimizer.step()

    return step


@pytest.mark.parametrize("compiled", [False, True])
def test_adamw_is_that_of_torch_with_changing_learning_rate_and_weight_decay(compiled):
    """Oracle: torch.optim.AdamW, not fused, in float64; 100 steps of float32 rounding lie between."""
    p = torch.randn(40, 30)
    oracle = torch.nn.Parameter(p.double())
    adamw = torch.optim.AdamW([oracle], betas=(0.8, 0.95), eps=1e-10, foreach=False)
    seen = adamw_of(p, compiled)
    for step in range(1, 101):
        lr, weight_decay = 0.01 * (1 + math.sin(step)), 0.1 * (step % 7)
        grad = torch.randn_like(p) * 10 ** math.cos(step)
        seen(grad, lr=lr, beta1=0.8, beta2=0.95, eps=1e-10, weight_decay=weight_decay)
        adamw.param_groups[0].update(lr=lr, weight_decay=weight_decay)
        oracle.grad = grad.double()
        adamw.step()
        torch.testing.assert_close(p.detach().double(), oracle.detach(), rtol=1e-4, atol=1e-5)


def test_adamw_step_on_a_bfloat16_table_computes_in_float32_and_rounds_what_it_stores():
    p, grad = torch.randn(40, 30).bfloat16(), torch.randn(40, 30).bfloat16()
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    exact = [t.float() for t in (p, grad, m, v)]
    options = scalars(step=1, lr=0.3, beta1=0.8, beta2=0.95, eps=1e-10, weight_decay=0.1)
    train.adamw_step(p, grad, m, v, **options)
    train.adamw_step(*exact, **options)
    for seen, expected in zip((p, m, v), (exact[0], exact[2], exact[3])):
        assert seen.dtype == torch.bfloat16 and torch.equal(seen, expected.bfloat16())


def test_the_optimizer_steps_a_bfloat16_table_as_a_float32_one_up_to_what_it_stores():
    """Three steps on a CPU: three roundings of up to 2**-8 of a number, and what the moments lose moves the update."""
    table = torch.randn(40, 30).bfloat16()
    exact, grads = table.float(), [torch.randn(40, 30).bfloat16() for _ in range(3)]
    steps = adamw_of(table, False), adamw_of(exact, False)
    for grad in grads:
        for step, g in zip(steps, (grad, grad.float())):
            step(g, lr=0.01, beta1=0.8, beta2=0.95, eps=1e-10, weight_decay=0.1)
    assert table.dtype == torch.bfloat16
    torch.testing.assert_close(table.detach().float(), exact.detach(), rtol=3 * 2**-8, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 64), (200, 50), (50, 200), (4, 32)])
def test_orthogonalize_brings_every_singular_value_near_1_and_keeps_the_directions(shape, dtype):
    u, _, vh = torch.linalg.svd(torch.randn(3, *shape, dtype=torch.float64), full_matrices=False)
    values = torch.logspace(0, -2, min(shape), dtype=torch.float64) * torch.tensor([1.0, 1e3, 1e-3])[:, None]
    seen = train.orthogonalize((u * values[:, None, :]) @ vh, dtype)
    assert seen.dtype == dtype and seen.shape == (3, *shape)
    # five iterations leave singular values within about 0.2 of 1, down to a hundredth of the largest
    assert (torch.linalg.svdvals(seen.double()) - 1).abs().max() < 0.25
    cosine = (seen.double() * (u @ vh)).sum((-2, -1)) / seen.double().norm(dim=(-2, -1)) / min(shape) ** 0.5
    assert cosine.min() > 0.98


def numpy_muon(p, g, m, s, momentum, lr, weight_decay, beta2):
    """The oracle, one float64 matrix, loops where the original has tensor algebra; returns p, m, s."""
    m = momentum * m + (1 - momentum) * g
    x = (1 - momentum) * g + momentum * m
    u, values, vh = np.linalg.svd(x, full_matrices=False)
    values = values / (1.02 * np.sqrt((values**2).sum()) + 1e-6)
    for a, b, c in train.POLAR_EXPRESS:  # an odd polynomial of a matrix acts on its singular values
        values = a * values + b * values**3 + c * values**5
    update = (u * values) @ vh
    rows, cols = p.shape
    neurons = update if rows >= cols else update.T  # one second moment per entry of the longer side
    s = beta2 * s + (1 - beta2) * np.array([np.mean(neuron**2) for neuron in neurons])
    scaled = np.array([neuron / np.sqrt(moment) for neuron, moment in zip(neurons, s)])
    scaled *= np.linalg.norm(update) / np.linalg.norm(scaled)
    update = scaled if rows >= cols else scaled.T
    decay = np.where(update * p > 0, weight_decay * p, 0)
    return p - lr * np.sqrt(max(1, rows / cols)) * (update + decay), m, s


@pytest.mark.parametrize("rows, cols", [(24, 24), (40, 16), (16, 40), (2, 32)])
def test_muon_step_agrees_with_a_derivation_by_singular_values(rows, cols):
    p, m = torch.randn(1, rows, cols), torch.zeros(1, rows, cols)
    s = torch.zeros((1, rows, 1) if rows >= cols else (1, 1, cols))
    p64, m64, s64 = p[0].double().numpy(), m[0].double().numpy(), np.zeros(max(rows, cols))
    for step in range(8):
        g = torch.randn(1, rows, cols)
        options = {"momentum": 0.85 + step / 100, "lr": 0.05 / (1 + step), "weight_decay": 0.3 - step / 40,
                   "beta2": 0.9}
        train.muon_step(p, g, m, s, **scalars(**options), dtype=torch.float32)
        p64, m64, s64 = numpy_muon(p64, g[0].double().numpy(), m64, s64, **options)
        # float32 through five cubic iterations of gain up to 8 each
        np.testing.assert_allclose(p[0].numpy(), p64, rtol=0, atol=2e-4)
        np.testing.assert_allclose(m[0].numpy(), m64, rtol=0, atol=1e-5)
        np.testing.assert_allclose(s.flatten().numpy(), s64, rtol=1e-2)


@pytest.mark.parametrize("rows, cols", [(40, 16), (16, 40)])
def test_normuon_keeps_the_norm_of_the_update_and_evens_out_its_longer_side(rows, cols):
    p, m = torch.zeros(2, rows, cols), torch.zeros(2, rows, cols)
    s = torch.zeros((2, rows, 1) if rows >= cols else (2, 1, cols))
    g = torch.randn(2, rows, cols) * (torch.rand(2, rows, 1) if rows >= cols else torch.rand(2, 1, cols))
    train.muon_step(p, g, m, s, **scalars(momentum=0.9, lr=1, weight_decay=0, beta2=0.95), dtype=torch.float32)
    plain = train.orthogonalize(g, torch.float32) * max(1, rows / cols) ** 0.5
    torch.testing.assert_close(p.norm(dim=(-2, -1)), plain.norm(dim=(-2, -1)))
    neurons = p.norm(dim=-1 if rows >= cols else -2)
    torch.testing.assert_close(neurons, neurons[:, :1].expand_as(neurons))  # the first step makes them equal


def test_weight_decay_acts_only_where_update_and_weight_agree_in_sign():
    def stepped(weight_decay):
        p, m, s = weights.clone(), torch.zeros(1, 24, 24), torch.zeros(1, 24, 1)
        options = scalars(momentum=0.9, lr=0.1, weight_decay=weight_decay, beta2=0.95)
        train.muon_step(p, g, m, s, **options, dtype=torch.float32)
        return p

    weights, g = torch.randn(1, 24, 24), torch.randn(1, 24, 24)
    plain, decayed = stepped(0.0), stepped(0.5)
    agree = (weights - plain) * weights > 0  # the update is what is subtracted
    assert 0.3 < agree.float().mean() < 0.7
    assert torch.equal(decayed[~agree], plain[~agree])
    torch.testing.assert_close(decayed[agree], plain[agree] - 0.1 * 0.5 * weights[agree])


def test_a_stack_of_matrices_steps_as_each_alone():
    """Batched and single matrix products may round differently: equal within float32 rounding."""
    options = scalars(momentum=0.9, lr=0.1, weight_decay=0.1, beta2=0.95)
    stack = [torch.randn(5, 24, 16), torch.randn(5, 24, 16), torch.randn(5, 24, 16), torch.rand(5, 24, 1)]
    alone = [[t[i : i + 1].clone() for t in stack] for i in range(5)]
    train.muon_step(*stack, **options, dtype=torch.float32)
    for tensors in alone:
        train.muon_step(*tensors, **options, dtype=torch.float32)
    for position in (0, 2, 3):  # parameters and both buffers
        torch.testing.assert_close(stack[position], torch.cat([tensors[position] for tensors in alone]))


def test_an_optimizer_step_is_the_pure_steps_applied_to_every_parameter():
    """Oracle: muon_step and adamw_step called by hand on copies, one matrix at a time, over three steps."""
    train.choose_attention(CPU)
    model, optimizer = train.build(CONFIG, CPU, torch.float32, False, 0)
    copies = {p: (p.detach().clone(), {}) for p in model.parameters()}
    before = [p.detach().clone() for p in model.parameters()]
    for step in range(1, 4):
        train.set_schedules(optimizer, 40 * step, 0.2 * step)
        idx = torch.randint(50, (2, 17))
        model(idx[:, :-1], idx[:, 1:]).backward()
        for p, (copy, state) in copies.items():
            group = next(g for g in optimizer.param_groups if any(p is member for member in g["params"]))
            names = ("lr", "weight_decay", "beta2", *(("momentum",) if group["kind"] == "muon" else ("beta1", "eps")))
            options = scalars(**{name: group[name] for name in names})
            if group["kind"] == "muon":
                assert p.ndim == 2
                rows, cols = p.shape
                shape = (1, rows, 1) if rows >= cols else (1, 1, cols)
                m, s = state.setdefault("buffers", (torch.zeros(1, rows, cols), torch.zeros(shape)))
                train.muon_step(copy[None], p.grad[None], m, s, **options, dtype=torch.float32)
            else:
                m, v = state.setdefault("moments", (torch.zeros_like(copy), torch.zeros_like(copy)))
                train.adamw_step(copy, p.grad, m, v, **options, **scalars(step=step))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    for (name, p), old in zip(model.named_parameters(), before):
        torch.testing.assert_close(p, copies[p][0], rtol=1e-4, atol=2e-4, msg=name)
        assert not torch.equal(p, old), name


def test_a_parameter_without_a_gradient_stays_as_it_is():
    train.choose_attention(CPU)
    model, optimizer = train.build(CONFIG, CPU, torch.float32, False, 0)
    model.lm_head.weight.square().sum().backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    assert [name for name, p in model.named_parameters() if not torch.equal(p, before[name])] == ["lm_head.weight"]


@pytest.mark.parametrize("n_layer, bigram_rows", [(1, 0), (4, 100)])
def test_the_groups_cover_exactly_the_parameters(n_layer, bigram_rows):
    model = train.GPT(train.GPTConfig(50, 16, n_layer, 2, 2, 64, (16,) * n_layer, bigram_rows))
    groups = train.parameter_groups(model)
    grouped = [p for group in groups for p in group["params"]]
    assert len(grouped) == len(set(grouped)) and set(grouped) == set(model.parameters())
    muon = {p for group in groups if group["kind"] == "muon" for p in group["params"]}
    assert muon == set(model.h.parameters())
    for group in groups:
        assert group["kind"] == "adamw" or len({p.shape for p in group["params"]}) == 1
        assert group["initial_lr"] == group["lr"] > 0
    tables = next(group for group in groups if model.wte.weight in set(group["params"]))
    assert tables["lr"] == pytest.approx(train.EMBEDDING_LR * (64 / 768) ** -0.5)


def test_a_parameter_in_no_group_or_in_two_is_an_error_that_names_it():
    model = train.GPT(CONFIG)
    model.extra = torch.nn.Linear(3, 3, bias=False)
    with pytest.raises(prepare.Failure, match=r"it does not for extra\.weight$"):
        train.parameter_groups(model)
    model = train.GPT(CONFIG)
    model.h[0].table = model.value_embeds[1]
    with pytest.raises(prepare.Failure, match=r"it does not for value_embeds\.1\.weight$"):
        train.parameter_groups(model)


def test_changing_scalars_compile_nothing_anew_and_few_numbers_nothing_at_all(compilations, monkeypatch):
    """One compilation per kind of step and shape of large tensors, however the options change from step to step."""
    monkeypatch.setattr(train, "COMPILED_FROM", 1000)
    train.choose_attention(CPU)
    model, optimizer = train.build(CONFIG, CPU, torch.float32, True, 0)
    sizes = {(g["kind"], p.shape): p.numel() * (len(g["params"]) if g["kind"] == "muon" else 1)
             for g in optimizer.param_groups for p in g["params"]}
    large = [size for size in sizes.values() if size >= 1000]
    for step in range(10):
        train.set_schedules(optimizer, 30 * step, step / 10)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
    assert compilations.frame_count == len(large) < len(sizes)


def muon_options(step, progress=0.0):
    """Momentum and weight decay of Muon's groups."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1)
    optimizer.param_groups[0] |= {"kind": "muon", "initial_lr": 1}
    train.set_schedules(optimizer, step, progress)
    return optimizer.param_groups[0]["momentum"], optimizer.param_groups[0]["weight_decay"]


def test_schedules_have_their_stated_values_at_both_ends():
    assert train.lr_multiplier(0.0) == 1.0 and train.lr_multiplier(1 - train.WARMDOWN_RATIO) == pytest.approx(1.0)
    assert train.lr_multiplier(1.0) == train.lr_multiplier(1.7) == train.FINAL_LR_FRAC
    middle = train.lr_multiplier(1 - train.WARMDOWN_RATIO / 2)
    assert middle == pytest.approx((1 + train.FINAL_LR_FRAC) / 2)
    values = [train.lr_multiplier(i / 1000) for i in range(1001)]
    steepest = (1 - train.FINAL_LR_FRAC) / train.WARMDOWN_RATIO / 1000
    assert all(0 <= a - b <= steepest * 1.001 for a, b in zip(values, values[1:]))  # never up, no jump
    assert (muon_options(0)[0], muon_options(train.MUON_RAMP)[0]) == train.MUON_MOMENTUM
    assert muon_options(10**6)[0] == train.MUON_MOMENTUM[1]
    assert muon_options(train.MUON_RAMP // 2)[0] == pytest.approx(sum(train.MUON_MOMENTUM) / 2)
    assert muon_options(0, 0.0)[1] == train.MUON_WEIGHT_DECAY
    assert muon_options(0, 0.5)[1] == pytest.approx(train.MUON_WEIGHT_DECAY / 2)
    assert muon_options(0, 1.0)[1] == muon_options(0, 1.1)[1] == 0


def test_schedules_without_a_warmdown_or_a_ramp_are_constant(monkeypatch):
    monkeypatch.setattr(train, "WARMDOWN_RATIO", 0.0)
    monkeypatch.setattr(train, "MUON_RAMP", 0)
    assert [train.lr_multiplier(progress) for progress in (0.0, 0.5, 0.999)] == [1.0, 1.0, 1.0]
    assert train.lr_multiplier(1.0) == train.FINAL_LR_FRAC
    assert muon_options(1)[0] == train.MUON_MOMENTUM[1]


def test_set_schedules_reaches_every_group():
    optimizer = train.MuonAdamW(train.parameter_groups(train.GPT(CONFIG)))
    train.set_schedules(optimizer, train.MUON_RAMP, 1.0)
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(group["initial_lr"] * train.FINAL_LR_FRAC)
        if group["kind"] == "muon":
            assert (group["momentum"], group["weight_decay"]) == (train.MUON_MOMENTUM[1], 0)
