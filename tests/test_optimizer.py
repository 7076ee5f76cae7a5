"""The optimizer: steps against independent derivations, groups, compilations, schedules."""

import math

import numpy as np
import pytest
import torch

import prepare
import train

CONFIG = train.GPTConfig(vocab_size=50, seq_len=16, n_layer=4, n_head=2, n_kv_head=2, n_embd=64,
                         windows=(16,) * 4, bigram_rows=100)


@pytest.mark.parametrize("dtype, steps, rtol, atol", [
    (torch.float32, 100, 1e-4, 1e-5), (torch.bfloat16, 3, 3 * 2**-8, 1e-3)])
def test_adamw_is_that_of_torch_for_an_added_group_while_options_change_and_states_are_loaded(dtype, steps, rtol, atol):
    """Oracle: torch's in float64; float32 rounding between, or that of a table and moments in bfloat16."""
    p = torch.randn(40, 30).to(dtype)
    oracle = torch.nn.Parameter(p.double())
    adamw = torch.optim.AdamW([oracle], betas=(0.8, 0.95), eps=1e-10, foreach=False)
    optimizer = train.MuonAdamW([{"kind": "adamw", "params": [torch.zeros(1)]}])
    optimizer.add_param_group({"kind": "adamw", "params": [p], "betas": (0.8, 0.95), "eps": 1e-10})
    for step in range(1, steps + 1):
        options = {"lr": 0.01 * (1 + math.sin(step)), "weight_decay": 0.1 * (step % 7)}
        optimizer.param_groups[1].update(options)
        adamw.param_groups[0].update(options)
        p.grad = (torch.randn(40, 30) * 10 ** math.cos(step)).to(dtype)
        oracle.grad = p.grad.double()
        optimizer.step()
        adamw.step()
        optimizer.load_state_dict(optimizer.state_dict())  # new groups, too
        assert p.dtype == dtype
        torch.testing.assert_close(p.double(), oracle.detach(), rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype, batches, decay, atol", [
    (torch.float32, 1, 0.02, 1e-6), (torch.float32, 3, 1.0, 1e-6), (torch.bfloat16, 1, 0.02, 2**-7)])
def test_rows_that_were_read_step_by_their_own_rms_and_all_rows_decay_now_and_then(dtype, batches, decay, atol):
    """Oracle: float64, loops over rows. A row read often, once, in one step only, and never."""
    table = torch.nn.Embedding(12, 8, sparse=True).to(dtype)
    p, v = table.weight.detach().double().numpy(), np.zeros(12)
    options = {"lr": 0.1, "beta2": 0.9, "eps": 1e-10, "weight_decay": decay}
    optimizer = train.MuonAdamW([{"kind": "rows", "params": [table.weight], **options}])
    for step in range(1, train.ROWS_DECAY_STEPS + 2):
        read = torch.tensor([[3, 3, 3, 5], [3, 0, step % 10, 10]]) if step != 4 else torch.full((2, 4), 7)
        gradient = torch.zeros(12, 8, dtype=torch.float64)
        for _ in range(batches):
            grads = (torch.randn(2, 4, 8) * 10.0 ** -(step % 4)).to(dtype)
            table(read).backward(grads)
            for row, grad in zip(read.flatten(), grads.flatten(0, 1)):
                gradient[row] += grad.double()
        optimizer.step()
        optimizer.zero_grad()
        for row, g in enumerate(gradient.numpy()):
            v[row] = 0.9 * v[row] + 0.1 * np.mean(g**2)
            if g.any():
                p[row] -= 0.1 * g / (np.sqrt(v[row] / (1 - 0.9**step)) + 1e-10)
        if step == train.ROWS_DECAY_STEPS:
            p *= max(0, 1 - step * 0.1 * decay)
        np.testing.assert_allclose(table.weight.detach().double().numpy(), p, rtol=0, atol=atol)
        p = table.weight.detach().double().numpy()  # rounding of one step only


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 64), (200, 50), (50, 200), (4, 32)])
def test_polar_express_brings_every_singular_value_near_1_and_keeps_the_directions(shape, dtype):
    u, _, vh = torch.linalg.svd(torch.randn(3, *shape, dtype=torch.float64), full_matrices=False)
    scales = torch.tensor([1.0, 1e3, 1e-3])[:, None]
    values = torch.logspace(0, -2, min(shape), dtype=torch.float64) * scales
    seen = train.polar_express((u * values[:, None, :]) @ vh, dtype)
    assert seen.dtype == dtype and seen.shape == (3, *shape)
    # five iterations leave singular values within 0.2 of 1, down to a hundredth of the largest
    assert (torch.linalg.svdvals(seen.double()) - 1).abs().max() < 0.25
    assert torch.cosine_similarity(seen.double().flatten(1), (u @ vh).flatten(1)).min() > 0.98


def numpy_muon(g, p, m, s, momentum, lr, weight_decay, beta2):
    """The oracle: one float64 matrix, loops where the original has tensor algebra -> p, m, s."""
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


@pytest.mark.parametrize("rows, cols, heads", [
    (24, 24, 1), (40, 16, 1), (16, 40, 1), (2, 32, 1), (48, 24, 2), (48, 24, 4)])
def test_muon_agrees_with_a_derivation_by_singular_values_also_while_one_of_a_stack_is_frozen(rows, cols, heads):
    """Heads are matrices by themselves, here as tall as wide and half as tall; each matrix is frozen for two steps."""
    stack = list(torch.randn(3, rows, cols).unbind())
    oracle = [[(part, 0 * part, np.zeros(max(part.shape))) for part in np.split(p.double().numpy(), heads)]
              for p in stack]
    optimizer = train.MuonAdamW([{"kind": "muon", "params": stack, "heads": heads}])
    for step in range(8):
        options = {"momentum": 0.85 + step / 100, "lr": 0.05 / (1 + step),
                   "weight_decay": 0.3 - step / 40, "beta2": 0.9}
        optimizer.param_groups[0].update(options)
        for i, p in enumerate(stack):
            p.grad = None if step // 2 == i else torch.randn(rows, cols)
        optimizer.step()
        for i, p in enumerate(stack):
            if p.grad is not None:
                gradients = np.split(p.grad.double().numpy(), heads)
                oracle[i] = [numpy_muon(g, *part, **options) for g, part in zip(gradients, oracle[i])]
            # float32 through five cubic iterations of gain up to 8 each
            p64, m64, s64 = map(np.concatenate, zip(*oracle[i]))
            np.testing.assert_allclose(p.numpy(), p64, rtol=0, atol=2e-4)
            if optimizer.state[p]:
                m, s = optimizer.state[p].values()
                np.testing.assert_allclose(m.flatten(0, 1).numpy(), m64, rtol=0, atol=1e-5)
                np.testing.assert_allclose(s.flatten().numpy(), s64, rtol=1e-2)


@pytest.mark.parametrize("n_layer, n_kv_head, bigram_rows", [(1, 2, 0), (4, 2, 100), (4, 1, 100)])
def test_the_groups_cover_exactly_the_parameters(n_layer, n_kv_head, bigram_rows):
    model = train.GPT(train.GPTConfig(50, 16, n_layer, 2, n_kv_head, 64, (16,) * n_layer, bigram_rows))
    groups = train.parameter_groups(model)
    grouped = [p for group in groups for p in group["params"]]
    assert len(grouped) == len(set(grouped)) and set(grouped) == set(model.parameters())
    heads = {p: group["heads"] for group in groups if group["kind"] == "muon" for p in group["params"]}
    assert set(heads) == set(model.h.parameters())
    by_head = {name.split(".", 2)[2] for name, p in model.h.named_parameters() if heads[p] == 2}
    assert by_head == {"c_q.weight"} | ({"c_k.weight", "c_v.weight"} if n_kv_head == 2 else set())
    for group in groups:
        assert group["kind"] != "muon" or len({p.shape for p in group["params"]}) == 1
        assert group["initial_lr"] == group["lr"] > 0
    scale, decay, table_lr = (64 / 768) ** -0.5, train.WEIGHT_DECAY, train.EMBEDDING_LR["cpu"]
    expected = {
        "lm_head": (train.UNEMBEDDING_LR * scale, decay["lm_head"], train.ADAM_BETAS),
        "wte": (table_lr * scale, decay["wte"], train.ADAM_BETAS),
        "resid_lambdas": (train.RESID_LR, 0, train.ADAM_BETAS),
        "value_embeds": (table_lr * scale, decay["value_embeds"], train.ADAM_BETAS),
        "x0_lambdas": (train.X0_LR["cpu"], 0, train.ADAM_BETAS),
        "h": (train.MATRIX_LR, train.MUON_WEIGHT_DECAY, train.MUON_BETA2),
        "ngrams": (train.BIGRAM_LR * scale, decay["ngrams"], train.BIGRAM_BETA2)}
    expected["bigram_value_embeds"] = expected["ngrams"]
    for name, p in model.named_parameters():
        (group,) = (group for group in groups if p in set(group["params"]))
        seen = group["lr"], group["weight_decay"], group.get("betas", group.get("beta2"))
        assert seen == expected[name.split(".")[0]], name


def test_a_parameter_in_no_group_or_in_two_and_an_unknown_kind_are_errors_that_name_it():
    left_out, doubled, tied, dense, plain = (train.GPT(CONFIG) for _ in range(5))
    left_out.extra = torch.nn.Linear(3, 3, bias=False)
    doubled.h[0].table = doubled.value_embeds[1]
    tied.lm_head.weight = tied.wte.weight
    dense.ngrams.sparse = False
    plain.weight = torch.nn.Parameter(torch.ones(3))
    for model, name in ((left_out, "extra.weight"), (doubled, "value_embeds.1.weight"), (tied, "wte.weight"),
                        (dense, "ngrams.weight"), (plain, "weight")):
        model.init_weights()
        with pytest.raises(prepare.Failure, match=f"^{name}: not in parameter_groups, or there twice"):
            train.parameter_groups(model)
    with pytest.raises(prepare.Failure, match="kind {'sgd'}; .* muon, rows and adamw"):
        train.MuonAdamW([{"params": [torch.zeros(2, 2)], "kind": "sgd"}]).step()


def test_in_a_block_no_matrix_trains_with_adamw_a_table_as_tables_do_and_queries_of_no_whole_heads_as_one_matrix():
    model = train.GPT(CONFIG)
    model.h[1].gain, model.h[3].mlp.c_fc = torch.nn.RMSNorm(64), torch.nn.Linear(64, 256)
    model.h[2].scale, model.h[1].table = torch.nn.Parameter(torch.tensor(0.5)), torch.nn.Embedding(50, 64)
    model.h[0].attn.c_q = torch.nn.Linear(64, 64 + 3, bias=False)
    model.h[0].attn.c_k.scale = torch.nn.Parameter(torch.tensor(0.5))
    new = [model.h[0].attn.c_k.scale, model.h[1].gain.weight, model.h[2].scale, model.h[3].mlp.c_fc.bias]
    before = [p.detach().clone() for p in new]
    groups = train.parameter_groups(model)
    group, table, wte, queries = (next(g for g in groups if set(g["params"]) == set(params)) for params in (
        new, [model.h[1].table.weight], [model.wte.weight], [model.h[0].attn.c_q.weight]))
    assert (group["kind"], group["lr"], group["weight_decay"]) == ("adamw", train.RESID_LR, 0)
    assert (table["kind"], table["lr"]) == ("adamw", wte["lr"]) and (queries["kind"], queries["heads"]) == ("muon", 1)
    sum(p.sum() for p in new).backward()
    train.MuonAdamW(groups).step()
    for p, old in zip(new, before):  # the first step of AdamW moves by lr against the sign
        torch.testing.assert_close(p.detach(), old - train.RESID_LR)


@pytest.mark.cuda
def test_rows_behind_two_billion_elements_are_read_and_stepped_as_the_first_are():
    """The default tables have as many. The first step of RMSprop moves by the rate against the sign."""
    table = torch.nn.Embedding(2**22 + 1, 768, sparse=True, device="cuda", dtype=torch.bfloat16)
    torch.nn.init.zeros_(table.weight)
    rows = torch.tensor([0, 2**22 - 1], device="cuda")
    group = {"kind": "rows", "lr": 0.5, "beta2": 0.99, "eps": 1e-10, "weight_decay": 0.0}
    optimizer = train.MuonAdamW([group | {"params": [table.weight]}], compiled=True)
    table(rows).sum().backward()
    optimizer.step()
    torch.testing.assert_close(table(rows), torch.full_like(table(rows), -0.5))
    assert table.weight.count_nonzero() == 2 * 768


@pytest.mark.parametrize("cuda, batches", [(True, 1), (False, 3)])
def test_changing_scalars_and_a_second_optimizer_compile_nothing_anew_and_few_numbers_nothing(
        cuda, batches, compilations, monkeypatch):
    """One compilation per shape of matrices, if they are large, and of tables; AdamW is torch's.

    Without CUDA none of tables, whose gradients change their shape where batches are accumulated.
    """
    monkeypatch.setattr(train, "COMPILED_FROM", 1000)
    model = train.GPT(CONFIG)
    optimizer, second = (train.MuonAdamW(train.parameter_groups(model), True) for _ in range(2))
    if cuda:
        optimizer.rows_step = second.rows_step = torch.compile(train.rows_step, dynamic=False, fullgraph=True)
    stacks = {(p.shape, g["heads"]): p.numel() * len(g["params"])
              for g in optimizer.param_groups for p in g["params"] if g["kind"] == "muon"}
    large = [size for size in stacks.values() if size >= 1000]
    for step in range(10):
        optimizer = second if step == 5 else optimizer  # as after warm-up
        train.set_schedules(optimizer, 30 * step, step / 10)
        train.train_step(model, optimizer, [(idx, idx) for idx in torch.randint(50, (batches, 2, 16))])
    assert compilations.frame_count == len(large) + 2 * cuda and len(large) < len(stacks)  # tables: two widths


def scheduled(step, progress):
    """Groups of the model's optimizer, after set_schedules."""
    optimizer = train.MuonAdamW(train.parameter_groups(train.GPT(CONFIG)))
    for at in (0, 0.9), (step, progress):  # nothing of an earlier step stays
        train.set_schedules(optimizer, *at)
    return optimizer.param_groups


def of_muon(name, *times):
    return [next(group[name] for group in scheduled(*time) if group["kind"] == "muon") for time in times]


def test_schedules_have_their_stated_values_at_both_ends_and_reach_every_group(monkeypatch):
    monkeypatch.setattr(train, "FINAL_LR_FRAC", 0.1)
    lr, ramp, (first, last) = train.lr_multiplier, train.MUON_RAMP, train.MUON_MOMENTUM
    assert lr(0.0) == 1.0 and lr(1 - train.WARMDOWN_RATIO) == pytest.approx(1.0)
    assert lr(1.0) == lr(1.7) == train.FINAL_LR_FRAC
    assert lr(1 - train.WARMDOWN_RATIO / 2) == pytest.approx((1 + train.FINAL_LR_FRAC) / 2)
    values = [lr(i / 1000) for i in range(1001)]
    steepest = (1 - train.FINAL_LR_FRAC) / train.WARMDOWN_RATIO / 1000
    assert all(0 <= a - b <= steepest * 1.001 for a, b in zip(values, values[1:]))  # no jump
    seen = of_muon("momentum", (0, 0), (ramp // 2, 0), (ramp, 0), (10**6, 0))
    assert seen == pytest.approx([first, (first + last) / 2, last, last])
    seen = of_muon("weight_decay", (0, 0), (0, 0.5), (0, 1), (0, 1.1))
    assert seen == pytest.approx([share * train.MUON_WEIGHT_DECAY for share in (1, 0.5, 0, 0)])
    for group in scheduled(ramp, 1.0):
        assert group["lr"] == pytest.approx(group["initial_lr"] * train.FINAL_LR_FRAC)
        assert group["kind"] != "muon" or group["weight_decay"] == 0


def test_a_weight_decay_of_a_groups_own_falls_to_0_too():
    groups = train.parameter_groups(train.GPT(CONFIG))
    own, other = (group for group in groups[-2:])
    own["initial_weight_decay"] = 0.5
    train.set_schedules(train.MuonAdamW(groups), 0, 0.5)
    assert (own["kind"], other["kind"]) == ("muon", "muon")
    assert (own["weight_decay"], other["weight_decay"]) == (0.25, train.MUON_WEIGHT_DECAY / 2)


def test_schedules_without_a_warmdown_or_a_ramp_are_constant(monkeypatch):
    monkeypatch.setattr(train, "WARMDOWN_RATIO", 0.0)
    monkeypatch.setattr(train, "MUON_RAMP", 0)
    assert [train.lr_multiplier(progress) for progress in (0.0, 0.5, 0.999)] == [1.0, 1.0, 1.0]
    assert of_muon("momentum", (1, 0)) == [train.MUON_MOMENTUM[1]]
