"""
What is being tried: model, optimizer, their hyperparameters and the training loop, in one file.

    uv run train.py                    (SEED=43 uv run train.py: another seed)

Trains for the contract's TIME_BUDGET, has prepare.evaluate_bpb score the model and prints a
summary; lower val_bpb is better. Reads the cache that prepare.py makes, or has it made; saves no
model. This is the one file the agent edits: all of it may change, as long as `model(idx)` gives
logits and the score comes from evaluate_bpb.
"""

import os
import sys

if __name__ == "__main__":  # else a profile.py, say, beside this file would replace Python's own
    here = os.path.dirname(os.path.realpath(__file__))
    sys.path[:] = [path for path in sys.path if path != here] + [here]

import functools
import gc
import math
import threading
import time
from dataclasses import dataclass, replace


def busy_share():
    """Share of processor time that programs take while this one sleeps; 0 without /proc/stat."""
    def read():
        with open("/proc/stat") as file:
            user, nice, system, idle, waiting, *more = map(int, file.readline().split()[1:9])
        return user + nice + system + sum(more), idle + waiting

    try:
        (busy, idle), _, (busier, idler) = read(), time.sleep(0.3), read()
        return (busier - busy) / max(busier - busy + idler - idle, 1)
    except (OSError, ValueError):
        return 0.0


# A step of the demo on two cores, if waiting threads spin and if they sleep: 231 and 448 ms on idle
# cores, 798 and 344 beside one busy program, 7144 and 409 beside two (medians of 2 to 36 steps).
# Three looks, because a command may just be ending; load that comes later is not seen
BUSY = (__name__ == "__main__" and "OMP_WAIT_POLICY" not in os.environ
        and all(busy_share() > 0.3 for _ in range(3)))
if BUSY:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # read when torch is imported

try:
    import torch
    import torch.nn as nn
    import torch.nn.functional as F

    import prepare
except ImportError as error:
    sys.exit(f"FAIL: {error}. Start with `uv run train.py`")

# --------------------------------------------------------------------------------------------------
# Hyperparameters

# Size. Where `knob` reads it, a knob may have a value per device type instead of one for all
DEPTH = {"cuda": 10, "mps": 4, "cpu": 3}  # layers: the one dial
ASPECT_RATIO = {"cuda": 76, "mps": 64, "cpu": 42}  # n_embd / DEPTH, rounded up to whole heads
HEAD_DIM = {"cuda": 128, "mps": 64, "cpu": 64}
HEADS_PER_KV_HEAD = 1  # query heads that share a key and value head
TOTAL_BATCH_SIZE = {"cuda": 2**17, "mps": 2**14, "cpu": 2**11}  # tokens per optimizer step
DEVICE_BATCH_SIZE = {"cuda": 32, "mps": 16, "cpu": 8}  # rows at once, at most; the exam's too
# For this first share of TIME_BUDGET a step takes half of its batches, rounded down: early
# gradients are so much alike that more steps teach more. 0.002 better on H200s in 150 s (n = 2)
HALF_BATCH_RATIO = {"cuda": 0.3, "mps": 0.0, "cpu": 0.0}
WINDOW_PATTERN = {"cuda": "SSL", "mps": "L", "cpu": "L"}  # tiled over the layers; the last is L
# Channels that attention and MLP take from the position before, see shift: 0.02 better in the demo
# (n = 5), 0.004 worse on an H200 (n = 2)
SHIFTED_CHANNELS = {"cuda": 0, "mps": 0, "cpu": 32}
BIGRAM_ROWS = {"cuda": 2**22, "mps": 2**17, "cpu": 2**17}  # hashed bigrams, and trigrams; 0: none
COMPILE = {"cuda": True, "mps": False, "cpu": False}  # a CPU needs a C++ compiler, and minutes

# Model
SHORT_WINDOW = 128  # keys before its own that a query of an S layer sees; L layers see all
ROPE_BASE = 200_000
Q_SCALE = 1.3  # q and k are normed; this sharpens attention
SOFTCAP = 12  # logits stay within +-SOFTCAP
GATE_CHANNELS = 32  # channels of x that a gate reads
X0_INIT = 0.05
ATTENTION = "auto"  # or the one to try: "fa3", "varlen", "sdpa"

# Optimizer
MATRIX_LR = 0.024  # Muon
MUON_MOMENTUM = (0.85, 0.95)  # at step 0, from step MUON_RAMP on
MUON_RAMP = 200
MUON_BETA2 = 0.95
MUON_WEIGHT_DECAY = 0.2  # falls linearly to 0
# Of token and value embeddings, at width 768; in the demo 0.3 gained 0.019 over 0.9 (n = 3)
EMBEDDING_LR = {"cuda": 0.4, "mps": 0.6, "cpu": 0.3}
BIGRAM_LR = 0.15  # of the hashed tables, at width 768
UNEMBEDDING_LR = 0.005  # at width 768
# Of the x0 lambdas. In the demo one noisy first step at 0.5 throws some seeds off for good
X0_LR = {"cuda": 0.5, "mps": 0.5, "cpu": 0.05}
RESID_LR = 0.005  # resid lambdas, and whatever in a block is no matrix
ADAM_BETAS = (0.8, 0.99)
BIGRAM_BETA2 = 0.99  # of rows_step
ADAM_EPS = 1e-10
ROWS_DECAY_STEPS = 32  # from one weight decay of the hashed tables to the next
COMPILED_FROM = 2**14  # elements; compiling Muon's step of fewer wastes a second
WEIGHT_DECAY = {"lm_head": 0.01, "wte": 0.001, "value_embeds": 0.01, "ngrams": 0.02}

# Schedule
WARMDOWN_RATIO = 0.9  # share of TIME_BUDGET
FINAL_LR_FRAC = 0.0  # of each learning rate
# Weight of the token after the next in the loss; falls to 0 at half of the budget. In the demo
# (commit 1732042) 0.5 gained 0.006, but five seeds then differed by 0.021 instead of 0.009
MTP_WEIGHT = {"cuda": 0.5, "mps": 0.5, "cpu": 0.0}


def knob(name, kind, least=None):
    """A hyperparameter's value on a device type; with `least`, a whole number not below that."""
    value = globals()[name]
    if isinstance(value, dict):
        demand(kind in value, name, value, f"a value for {kind!r} too")
        value = value[kind]
    if least is not None:
        demand(isinstance(value, int) and value >= least, name, value, f"a whole number, at least {least}")
    return value


def demand(fine, name, value, wanted):
    if not fine:
        raise prepare.Failure(f"{name} is {value!r}; give {wanted}")


def are_numbers(*values):
    return all(isinstance(value, (int, float)) for value in values)


# --------------------------------------------------------------------------------------------------
# Attention

FA3_KERNEL = "kernels-community/flash-attn3"
FA3_ALLOWED: list[str] = []  # publishers whose kernels may run though the hub does not trust them
HUB_SECONDS = 120  # a hub that accepts and never answers must not hang the run


# Each way: q (B, T, H, D), k, v (B, T, Hkv, D) -> (B, T, H, D); query t sees keys t - window to t
def attention_fa3(flash_attn_func, q, k, v, window):
    window = -1 if window >= q.size(1) - 1 else window
    y = flash_attn_func(q, k, v, causal=True, window_size=(window, 0))
    return y[0] if isinstance(y, tuple) else y  # some builds also return the log-sum-exp


def attention_varlen(q, k, v, window):
    from torch.nn.attention.varlen import varlen_attn
    B, T, H, D = q.shape
    ends = torch.arange(0, (B + 1) * T, T, device=q.device, dtype=torch.int32)
    q, k, v = (t.reshape(B * T, -1, D) for t in (q, k, v))  # (B*T, H, D): rows one after another
    window = (-1 if window >= T - 1 else window, 0)
    return varlen_attn(q, k, v, ends, ends, T, T, window_size=window).view(B, T, H, D)


def attention_sdpa(q, k, v, window):
    T = q.size(1)
    mask = None if window >= T - 1 else band_mask(T, window, q.device)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, D)
    options = dict(attn_mask=mask, is_causal=mask is None, enable_gqa=q.size(1) != k.size(1))
    return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)


@functools.cache
def band_mask(T, window, device):
    """Boolean (T, T), True where query (row) may see key (column)."""
    return torch.ones(T, T, dtype=torch.bool, device=device).tril().triu(-window)


attention = attention_sdpa  # choose_attention sets it


def choose_attention(device, wanted="auto"):
    """Set `attention`; returns its name and the reason in one line."""
    global attention
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    possible = ("auto", "sdpa", "varlen", "fa3") if capability >= (8, 0) else ("auto", "sdpa")
    if wanted not in possible:
        raise prepare.Failure(f"ATTENTION is {wanted!r} on {device.type} {capability}; "
                              f"use {' or '.join(possible)}")
    if wanted == "sdpa" or capability < (8, 0):
        attention = attention_sdpa
        return "sdpa", f"torch's scaled_dot_product_attention on {device.type}"
    attention, reason = attention_varlen, "torch's varlen_attn"
    if wanted == "fa3" or (wanted == "auto" and capability == (9, 0) and not torch.version.hip):
        try:
            attention = functools.partial(attention_fa3, load_kernel())
            return "fa3", f"Flash Attention 3 from {FA3_KERNEL}"
        except prepare.Failure as failure:
            reason = f"NO FLASH ATTENTION 3: {FA3_KERNEL} did not load ({failure}); {reason}"
    return "varlen", reason


def load_kernel():
    """Return flash_attn_func of FA3_KERNEL, version 1; a Failure says what came instead."""
    found, problem = [], [f"no answer from the hub within {HUB_SECONDS} s"]

    def load():
        try:
            import kernels
            kernel = kernels.get_kernel(FA3_KERNEL, version=1, trust_remote_code=FA3_ALLOWED)
            found.append(kernel.flash_attn_func)
        except BaseException as error:  # anything can come of importing a stranger's build
            problem.append(f"{type(error).__name__}: {prepare.cause(error)}")

    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)
    if not found:
        raise prepare.Failure(problem[-1])
    return found[0]


# --------------------------------------------------------------------------------------------------
# Model


@dataclass(frozen=True)
class GPTConfig:
    vocab_size: int
    seq_len: int  # tokens; T may be shorter
    n_layer: int
    n_head: int
    n_kv_head: int
    n_embd: int
    windows: tuple  # per layer, see attention
    bigram_rows: int = 0
    shifted: int = 0  # channels, see shift
    table_dtype: torch.dtype = torch.float32


def window_sizes(pattern, n_layer, short, seq_len):
    """Window of each layer: the pattern of S and L tiled over the layers, the last one always L."""
    if not pattern or set(pattern) - {"S", "L"}:
        raise prepare.Failure(f"WINDOW_PATTERN is {pattern!r}; it takes S and L only, as in SSSL")
    tiled = [pattern[i % len(pattern)] for i in range(n_layer - 1)] + ["L"]
    return tuple(min(short, seq_len) if letter == "S" else seq_len for letter in tiled)


def has_ve(layer, n_layer):
    """Whether a layer has a value embedding: every second one, the last included."""
    return (n_layer - 1 - layer) % 2 == 0


def norm(x):
    return F.rms_norm(x, (x.size(-1),))


def precompute_rotary(seq_len, head_dim, device):
    """float32 cos (1, T, 1, 1, head_dim/2) and sin, -sin (1, T, 1, 2, head_dim/2).

    The first half of the pairs turns, the others stand still (modded-nanogpt).
    """
    turning = head_dim // 4
    inverse = ROPE_BASE ** -(torch.arange(turning, dtype=torch.float32, device=device) / turning)
    inverse = F.pad(inverse, (0, head_dim // 2 - turning))
    positions = torch.arange(seq_len, dtype=torch.float32, device=device)
    angles = torch.outer(positions, inverse)[None, :, None, None, :]
    return angles.cos(), torch.cat([angles, -angles], dim=-2).sin()


def apply_rotary_emb(x, cos, sin):
    """Apply RoPE to x (B, T, H, D): each pair (x[d], x[d + D/2]) turns by its position's angle."""
    x = x.unflatten(-1, (2, -1))  # (B, T, H, 2, D/2)
    return (x * cos + x.flip(-2) * sin).flatten(-2)


def offset_keys(k):
    """Take the channels that RoPE leaves alone from the key one position earlier: k (B, T, H, D).

    A query that looks for its own token then finds what followed it, in one layer (modded-nanogpt).
    """
    a, still_a, b, still_b = k.chunk(4, dim=-1)  # RoPE pairs channel d with d + D/2
    still_a, still_b = (torch.cat([t[:, :1], t[:, :-1]], dim=1) for t in (still_a, still_b))
    return torch.cat([a, still_a, b, still_b], dim=-1)


def shift(x, count):
    """Take the last `count` channels of x (B, T, C) from the position before, as RWKV does."""
    if not count:
        return x
    return torch.cat([x[..., :-count], F.pad(x[:, :-1, -count:], (0, 0, 1, 0))], dim=-1)


def ngram_hash(idx, n, rows):
    """Row of each position's last n tokens in a table of `rows`: int64 (B, T) for idx (B, T)."""
    seen = idx
    for back in range(1, n):
        seen = (seen * 1_000_003 + F.pad(idx, (back, 0))[:, :idx.size(1)]) % (2**31 - 1)
    return seen % rows


def gate(linear, x):
    """A factor per head (B, T, H, 1) from x's first channels, x (B, T, C); zero weights give 1."""
    return 2 * torch.sigmoid(linear(x[..., :GATE_CHANNELS])).unsqueeze(-1)


class CausalSelfAttention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.window, self.head_dim = config.windows[layer], config.n_embd // config.n_head
        self.sees_all = self.window == config.seq_len
        self.c_q = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.c_k = nn.Linear(config.n_embd, config.n_kv_head * self.head_dim, bias=False)
        self.c_v = nn.Linear(config.n_embd, config.n_kv_head * self.head_dim, bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.attn_gate = nn.Linear(GATE_CHANNELS, config.n_head, bias=False)
        if has_ve(layer, config.n_layer):
            self.ve_gate = nn.Linear(GATE_CHANNELS, config.n_kv_head, bias=False)

    def qkv(self, x, ve, cos, sin):
        """x (B, T, C), ve (B, T, Hkv * D) or None -> q (B, T, H, D), k and v (B, T, Hkv, D)."""
        heads = (-1, self.head_dim)
        q = self.c_q(x).unflatten(-1, heads)  # (B, T, H, D)
        k, v = self.c_k(x).unflatten(-1, heads), self.c_v(x).unflatten(-1, heads)  # (B, T, Hkv, D)
        if ve is not None:  # value residual (ResFormer, arXiv 2410.17897)
            v = v + gate(self.ve_gate, x) * ve.unflatten(-1, heads)
        q, k = Q_SCALE * norm(q), norm(k)
        k = offset_keys(k) if self.sees_all else k
        q, k = apply_rotary_emb(q, cos, sin), apply_rotary_emb(k, cos, sin)  # rotations keep norms
        return q.to(v.dtype), k.to(v.dtype), v


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x):
        return self.c_proj(F.leaky_relu(self.c_fc(x), 0.5).square())


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.attn = CausalSelfAttention(config, layer)
        self.mlp = MLP(config)
        self.shifted = config.shifted

    def before(self, x, x0, ve, resid_lambda, x0_lambda, cos, sin):
        """What comes before attention: x (B, T, C), its gate (B, T, H, 1), q, k, v."""
        x = resid_lambda * x + x0_lambda * x0
        y = shift(norm(x), self.shifted)
        return x, gate(self.attn.attn_gate, y), *self.attn.qkv(y, ve, cos, sin)

    def after(self, x, attn_gate, y):
        """What comes after it: y (B, T, H, D) -> x (B, T, C)."""
        x = x + self.attn.c_proj((attn_gate * y).flatten(2))  # gated attention (arXiv 2505.06708)
        return x + self.mlp(shift(norm(x), self.shifted))

    def forward(self, x, *rest):
        """x and x0 (B, T, C), ve (B, T, Hkv * D) or None, two lambdas, cos, sin -> (B, T, C)."""
        x, attn_gate, *qkv = self.before(x, *rest)
        return self.after(x, attn_gate, attention(*qkv, self.attn.window))


class GPT(nn.Module):
    """Pre-norm GPT: model(idx) -> logits (B, T, V) float32, model(idx, targets) -> mean loss."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        n_layer, n_embd = config.n_layer, config.n_embd
        kv_dim = n_embd // config.n_head * config.n_kv_head
        table = functools.partial(nn.Embedding, dtype=config.table_dtype)
        self.wte = table(config.vocab_size, n_embd)
        rows = config.bigram_rows
        # Bigrams give one half of the channels, trigrams the other: 0.004 better on H200s than
        # bigrams alone (n = 2). A step reads few rows: sparse gradients (no clip_grad_norm_ or
        # AdamW for them), and a spare last row for rows_step
        self.ngrams = table(2 * rows + 1, n_embd // 2, sparse=True) if rows else None
        self.bigram_value_embeds = table(rows + 1, kv_dim, sparse=True) if rows else None
        self.value_embeds = nn.ModuleList(table(config.vocab_size, kv_dim)
                                          for i in range(n_layer) if has_ve(i, n_layer))
        self.resid_lambdas = nn.Parameter(torch.ones(n_layer))
        self.x0_lambdas = nn.Parameter(torch.full((n_layer,), float(X0_INIT)))
        self.h = nn.ModuleList([Block(config, i) for i in range(n_layer)])
        self.lm_head = nn.Linear(n_embd, config.vocab_size, bias=False)
        self.register_buffer("mtp_weight", torch.zeros(()), persistent=False)  # see head

    @torch.no_grad()
    def init_weights(self):
        """Fill the matrices from torch's random state; those not named here stay as made."""
        bound = (3 / self.config.n_embd) ** 0.5  # for a standard deviation of n_embd ** -0.5
        for name, p in self.named_parameters():
            *_, part = (s for s in name.removesuffix(".weight").split(".") if not s.isdigit())
            if p.ndim == 1:  # a norm in an edited c_proj, say
                continue
            if part == "wte":
                p.normal_(0, 1)
            elif part == "lm_head":
                p.normal_(0, 0.001)
            elif part in ("c_q", "c_k", "c_v", "c_fc", "value_embeds"):
                p.uniform_(-bound, bound)
            elif part in ("c_proj", "ve_gate", "attn_gate", "ngrams", "bigram_value_embeds"):
                p.zero_()

    def embed(self, idx, ngrams, bigram_value):
        """idx (B, T), ngrams (B, T, C) or 0, bigram_value (B, T, Hkv * D) or 0 -> x0, all ve."""
        value_embeds = [table(idx) + bigram_value for table in self.value_embeds]
        return norm(self.wte(idx) + ngrams), value_embeds

    def head(self, x, targets):
        """x (B, T, C) -> logits (B, T, V) float32, or with targets (B, T) the mean loss.

        The loss is the cross-entropy with the next token and, times mtp_weight, with the one
        after it, which teaches more early in a run (multi-token prediction, arXiv 2404.19737).
        tanh by a sigmoid, exp by exp2 and no maximum taken off (capped logits cannot overflow)
        halve the loss's instructions: 2.8 ms instead of 4.9 on an H200 at 2^17 tokens.
        """
        logits = self.lm_head(norm(x)).float()
        logits = SOFTCAP * (2 * torch.sigmoid(logits * (2 / SOFTCAP)) - 1)  # a tanh
        if targets is None:
            return logits
        exp_sum = torch.exp2(logits / math.log(2)).sum(-1)
        vocabulary = torch.arange(logits.size(-1), device=logits.device)
        after = F.pad(targets[:, 1:], (0, 1), value=-1)  # a row's last position has none
        wanted = (torch.where(targets[..., None] == vocabulary, 1.0, 0.0)
                  + torch.where(after[..., None] == vocabulary, self.mtp_weight, 0.0))
        weights = wanted.sum(-1)
        return (exp_sum.log() * weights - (wanted * logits).sum(-1)).sum() / weights.sum()

    def forward(self, idx, targets=None):
        head_dim = self.config.n_embd // self.config.n_head
        cos, sin = precompute_rotary(idx.size(1), head_dim, idx.device)
        ngrams = bigram_value = 0
        if self.ngrams is not None:  # here, because compiled code makes no sparse gradients
            rows = self.config.bigram_rows
            bigrams, trigrams = ngram_hash(idx, 2, rows), ngram_hash(idx, 3, rows)
            ngrams = self.ngrams(torch.stack([bigrams, rows + trigrams], dim=-1)).flatten(-2)
            bigram_value = self.bigram_value_embeds(bigrams)
        x0, value_embeds = self.embed(idx, ngrams, bigram_value)
        x = x0.clone()  # where x is x0, the first block would be compiled once more
        layers = zip(self.h, self.resid_lambdas, self.x0_lambdas, strict=True)
        for i, (block, *lambdas) in enumerate(layers):
            ve = value_embeds.pop(0) if has_ve(i, self.config.n_layer) else None
            x = block(x, x0, ve, *lambdas, cos, sin)
            if targets is None and not self.training:  # the exam: keep no layer's activations
                # requires_grad_: see compile_parts; clone: an edited block may work in place
                x = x.detach().requires_grad_().clone()
        return self.head(x, targets)

    def flops_per_token(self):
        """Training FLOPs per token as MFU counts them (PaLM, arXiv 2204.02311, appendix B).

        A matrix of an nn.Linear counts once, however often it is used; others do not count.
        """
        matmul = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        keys = sum(min(window + 1, self.config.seq_len) for window in self.config.windows)
        return 6 * matmul + 12 * self.config.n_embd * keys


def compile_parts():
    """Compile what stands around attention, once for all layers; attention may be any kernel.

    A block compiled whole breaks at attention into four graphs instead of these two, which costs 1
    to 2 % of a step on an H100.
    """
    torch._dynamo.config.recompile_limit = 64  # with and without ve, for each batch shape
    for owner, part in ((Block, "before"), (Block, "after"), (GPT, "embed"), (GPT, "head")):
        # Of the class, not of a model: a copied model then runs its own weights
        setattr(owner, part, torch.compile(getattr(owner, part), dynamic=False))
    # Grad mode is a compile guard: off in the exam, all would compile again (6 s on an H100)
    GPT.forward = torch.enable_grad()(GPT.forward)


# --------------------------------------------------------------------------------------------------
# Optimizer

# Of Polar Express (arXiv 2505.16932): a, b, c of 5 iterations, safety factor 2e-2, cushion 2
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def polar_express(matrices, dtype):
    """Bring all singular values of each of (N, rows, cols) near 1, and keep their directions."""
    tall = matrices.size(-2) > matrices.size(-1)
    x = (matrices.mT if tall else matrices).to(dtype)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6).to(dtype)  # singular values below 1
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b gram + c gram gram
        x = torch.baddbmm(x, gram, x, beta=a)  # a x + gram x
    return x.mT if tall else x


def muon_step(params, grads, momentum_buffer, second_moment, momentum, lr, weight_decay, beta2,
              dtype):
    """Muon step of same-shape matrices, stacked (N, rows, cols); all but grads change in place.

    m <- momentum m + (1 - momentum) g;  u = polar_express(Nesterov of m)
    s <- beta2 s + (1 - beta2) mean(u^2) over the shorter side of u
    u <- u / sqrt(s), scaled back to its old norm
    p <- p - lr sqrt(max(1, rows / cols)) (u + weight_decay p where u p > 0)
    NorMuon (arXiv 2510.05491), cautious weight decay (arXiv 2510.12402).
    """
    momentum_buffer.mul_(momentum).add_(grads * (1 - momentum))
    u = polar_express(grads * (1 - momentum) + momentum_buffer * momentum, dtype).float()
    rows, cols = u.shape[-2:]
    v_mean = u.square().mean(dim=-1 if rows >= cols else -2, keepdim=True)
    second_moment.mul_(beta2).add_(v_mean * (1 - beta2))
    scale = second_moment.clamp_min(1e-10).rsqrt()
    scaled = (v_mean * scale.square()).sum((-2, -1), True).clamp_min(1e-20)  # norm^2 of u * scale
    u = u * scale * (v_mean.sum((-2, -1), True) / scaled).sqrt()
    params.sub_(lr * max(1, rows / cols) ** 0.5 * (u + weight_decay * params * (u * params > 0)))


def rows_step(table, rows, grads, second_moment, step, lr, beta2, eps):
    """RMSprop step, in place, of the rows of a table (R, C) that a batch read.

    rows (N,) int64 with repeats, grads (N, C), one per reading; second_moment (R,), one per row.
    With g the sum of a row's gradients, 0 if it was not read:

    v <- beta2 v + (1 - beta2) mean(g^2);  p <- p - lr g / (sqrt(v / (1 - beta2^step)) + eps)

    Only the device knows how many rows differ, and the host must not wait for it. So N rows are
    stepped: those that differ and, for the rest, the table's last by zeros: no batch may read it.
    """
    rows, order = rows.sort()
    place = F.pad((rows[1:] != rows[:-1]).cumsum(0), (1, 0))  # of each reading's row in `different`
    different = torch.full_like(rows, table.size(0) - 1).scatter_(0, place, rows)
    g = torch.zeros(grads.shape, device=grads.device).index_add_(0, place, grads[order].float())
    second_moment.mul_(beta2).index_add_(0, different, g.square().mean(-1) * (1 - beta2))
    denominator = (second_moment[different] / (1 - beta2**step)).sqrt() + eps
    table[different] = (table[different].float() - g * (lr / denominator)[:, None]).to(table.dtype)


def scalars(options, *names):
    """Options as 0-D tensors, because a Python number that changes would compile a step anew."""
    return {name: torch.tensor(float(options[name])) for name in names}


class MuonAdamW(torch.optim.Optimizer):
    """Groups of kind "muon": matrices of one shape; "rows": embeddings with sparse gradients;
    "adamw": all else, by torch's AdamW. The options of a group may change from step to step.

    `heads` of a muon group: into how many matrices of as many rows each is cut for its step.
    `compiled`: Muon's steps of COMPILED_FROM elements or more and, on CUDA, those of rows go
    through torch.compile. `dtype`: of polar_express.
    """

    def __init__(self, groups, compiled=False, dtype=torch.float32):
        super().__init__(groups, {})
        self.dtype = dtype
        compile_step = functools.partial(torch.compile, dynamic=False, fullgraph=True)
        self.muon_step = compile_step(muon_step) if compiled else muon_step
        # On CUDA a sparse gradient has as many rows as the batches read; a CPU may merge equal
        # ones, and the step would be compiled again for every new count
        on_cuda = all(p.is_cuda for group in self.param_groups for p in group["params"])
        self.rows_step = compile_step(rows_step) if compiled and on_cuda else rows_step
        self.adamw = torch.optim.AdamW([torch.zeros(1)], fused=True)  # step gives it its groups

    @torch.no_grad()
    def step(self):
        if unknown := {g.get("kind") for g in self.param_groups} - {"muon", "rows", "adamw"}:
            raise prepare.Failure(f"groups of kind {unknown}; there are muon, rows and adamw")
        # What was changed or added since the last step reaches it, too
        self.adamw.state = self.state
        self.adamw.param_groups = [self.adamw.defaults | group for group in self.param_groups
                                   if group["kind"] == "adamw"]
        self.adamw.step()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params and group["kind"] == "rows":
                self.step_rows(group, params)
            elif params and group["kind"] == "muon":
                self.step_muon(group, params)

    def step_rows(self, group, params):
        for p in params:
            state = self.state[p]
            if not state:
                state["step"], state["second_moment"] = 0, torch.zeros(p.size(0), device=p.device)
            state["step"] += 1
            self.rows_step(p, p.grad._indices()[0], p.grad._values(), state["second_moment"],
                           **scalars(group | state, "step", "lr", "beta2", "eps"))
            # All rows decay, but not in each step: bfloat16 would round so small a change away
            if state["step"] % ROWS_DECAY_STEPS == 0:
                p.mul_(max(0, 1 - ROWS_DECAY_STEPS * group["lr"] * group["weight_decay"]))

    def step_muon(self, group, params):
        heads = group.get("heads", 1)
        parts = [p.unflatten(0, (heads, -1)) for p in params]  # views (heads, rows, cols)
        grads = [p.grad.unflatten(0, (heads, -1)) for p in params]
        for p, part in zip(params, parts):
            if not self.state[p]:
                shorter = -1 if part.size(-2) >= part.size(-1) else -2
                self.state[p]["momentum_buffer"] = torch.zeros_like(part)
                self.state[p]["second_moment"] = torch.zeros_like(part.mean(shorter, keepdim=True))
        momenta = [self.state[p]["momentum_buffer"] for p in params]
        moments = [self.state[p]["second_moment"] for p in params]
        p, g, m, s = map(torch.cat, (parts, grads, momenta, moments))  # one batch
        step = self.muon_step if p.numel() >= COMPILED_FROM else muon_step
        options = scalars(group, "momentum", "lr", "weight_decay", "beta2")
        step(p, g, m, s, **options, dtype=self.dtype)
        for each, changed in ((parts, p), (momenta, m), (moments, s)):
            torch._foreach_copy_(each, list(changed.split(heads)))


def parameter_groups(model):
    """Optimizer groups that cover the model's parameters, each once; a Failure names others."""
    scale = (model.config.n_embd / 768) ** -0.5
    device_type = model.wte.weight.device.type
    embedding_lr = knob("EMBEDDING_LR", device_type) * scale

    def adamw(params, lr, decay=0.0):
        return {"kind": "adamw", "params": list(params), "lr": lr, "betas": ADAM_BETAS,
                "eps": ADAM_EPS, "weight_decay": decay}

    groups = [
        adamw(model.lm_head.parameters(), UNEMBEDDING_LR * scale, WEIGHT_DECAY["lm_head"]),
        adamw(model.wte.parameters(), embedding_lr, WEIGHT_DECAY["wte"]),
        adamw(model.value_embeds.parameters(), embedding_lr, WEIGHT_DECAY["value_embeds"]),
        adamw([model.resid_lambdas], RESID_LR),
        adamw([model.x0_lambdas], knob("X0_LR", device_type)),
    ]
    if model.ngrams is not None:
        tables = [t.weight for t in (model.ngrams, model.bigram_value_embeds) if t.sparse]
        groups.append({"kind": "rows", "params": tables, "lr": BIGRAM_LR * scale, "eps": ADAM_EPS,
                       "beta2": BIGRAM_BETA2, "weight_decay": WEIGHT_DECAY["ngrams"]})
    # The blocks, with whatever an edit puts there: tables, what is no matrix, matrices
    embeddings = {m.weight for m in model.h.modules() if isinstance(m, nn.Embedding)}
    groups.append(adamw(embeddings, embedding_lr, WEIGHT_DECAY["value_embeds"]))
    groups.append(adamw([p for p in model.h.parameters() if p.ndim != 2], RESID_LR))
    # Matrices of one shape are stepped as one batch, and every head of q, k and v by itself, which
    # is 0.003 better on H100s (n = 5)
    head_dim, stacks = model.config.n_embd // model.config.n_head, {}
    for name, p in model.h.named_parameters():
        if p.ndim == 2 and p not in embeddings:
            by_head = {"c_q", "c_k", "c_v"} & set(name.split(".")) and p.size(0) % head_dim == 0
            heads = p.size(0) // head_dim if by_head else 1
            stacks.setdefault((p.shape, heads), []).append(p)
    for (_, heads), params in sorted(stacks.items()):
        groups.append({"kind": "muon", "params": params, "heads": heads, "lr": MATRIX_LR,
                       "momentum": MUON_MOMENTUM[0], "beta2": MUON_BETA2,
                       "weight_decay": MUON_WEIGHT_DECAY})
    grouped = [id(p) for group in groups for p in group["params"]]
    if wrong := [name for name, p in model.named_parameters() if grouped.count(id(p)) != 1]:
        raise prepare.Failure(f"{', '.join(wrong)}: not in parameter_groups, or there twice")
    return [group | {"initial_lr": group["lr"], "initial_weight_decay": group["weight_decay"]}
            for group in groups if group["params"]]


def lr_multiplier(progress: float) -> float:
    """1 until progress 1 - WARMDOWN_RATIO, then linearly down to FINAL_LR_FRAC at progress 1."""
    left = min((1 - min(progress, 1.0)) / max(WARMDOWN_RATIO, 1e-9), 1.0)
    return left + (1 - left) * FINAL_LR_FRAC


def batches_per_step(full: int, progress: float, half_until: float) -> int:
    """`full`, but until progress `half_until` half of that, rounded down, at least 1."""
    return max(full // 2, 1) if progress < half_until else full


def set_schedules(optimizer, step: int, progress: float) -> None:
    """Learning rates by lr_multiplier; Muon's momentum by MUON_MOMENTUM, its weight decay to 0."""
    ramp = min(step / max(MUON_RAMP, 1), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * lr_multiplier(progress)
        if group["kind"] == "muon":
            group["momentum"] = (1 - ramp) * MUON_MOMENTUM[0] + ramp * MUON_MOMENTUM[1]
            group["weight_decay"] = group["initial_weight_decay"] * (1 - min(progress, 1.0))


# --------------------------------------------------------------------------------------------------
# Run

LOG_SECONDS = 5  # between two log lines
WARMUP_STEPS = 3  # thrown away

# Dense bf16 FLOP/s by device name, from the vendors' data sheets; the first match counts
PEAK_FLOPS = {
    "Laptop GPU": None, "MIG": None,  # less than the card whose name is in theirs
    "GB200": 2500e12, "B200": 2250e12, "H200 NVL": 835e12, "H200": 989e12, "H100 PCIe": 756e12,
    "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "MI300X": 1307e12,
    "RTX 5090 D": None, "RTX 5090": 209.5e12, "RTX 4090 D": None, "RTX 4090": 165.2e12,
    "RTX 3090 Ti": None, "RTX 3090": 71e12,
}


def compute_dtype(device):
    """bfloat16 where the hardware has it, else float32: emulated bfloat16 is many times slower."""
    fast = False
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    elif device.type == "cpu":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def sizes(kind, seq_len, vocab_size):
    """(GPTConfig, tokens per step, rows at once) of the knobs on a device type; checks them."""
    depth, head_dim = knob("DEPTH", kind, 1), knob("HEAD_DIM", kind, 1)
    n_embd = math.ceil(depth * knob("ASPECT_RATIO", kind, 1) / head_dim) * head_dim  # whole heads
    n_head, shared = n_embd // head_dim, knob("HEADS_PER_KV_HEAD", kind, 1)
    total, rows = knob("TOTAL_BATCH_SIZE", kind, 1), knob("DEVICE_BATCH_SIZE", kind, 1)
    demand(head_dim % 4 == 0, "HEAD_DIM", head_dim, "a multiple of 4: RoPE turns half of the pairs")
    demand(n_head % shared == 0, "HEADS_PER_KV_HEAD", shared, f"a divisor of the {n_head} heads")
    demand(GATE_CHANNELS in range(1, n_embd + 1), "GATE_CHANNELS", GATE_CHANNELS, f"1 to {n_embd}")
    demand(are_numbers(SOFTCAP) and 0 < SOFTCAP <= 79, "SOFTCAP", SOFTCAP,
           "above 0 and at most 79, where a sum of 8192 exp still fits into float32")
    # Those that `knob` reads; the others are one number for all device types
    by_kind = {"HALF_BATCH_RATIO", "MTP_WEIGHT", "X0_LR", "EMBEDDING_LR"}
    for name in (by_kind | {"X0_INIT", "RESID_LR", "BIGRAM_LR", "MATRIX_LR", "UNEMBEDDING_LR",
                            "Q_SCALE", "ROPE_BASE", "MUON_RAMP", "MUON_BETA2", "MUON_WEIGHT_DECAY",
                            "BIGRAM_BETA2", "ADAM_EPS", "WARMDOWN_RATIO", "FINAL_LR_FRAC"}
                 ) & set(globals()):
        value = knob(name, kind) if name in by_kind else globals()[name]
        demand(are_numbers(value), name, value, "a number")
    demand(isinstance(WEIGHT_DECAY, dict) and are_numbers(*WEIGHT_DECAY.values()), "WEIGHT_DECAY",
           WEIGHT_DECAY, "a number for each name")
    for name, pair in ("MUON_MOMENTUM", MUON_MOMENTUM), ("ADAM_BETAS", ADAM_BETAS):
        fine = isinstance(pair, (tuple, list)) and len(pair) == 2 and are_numbers(*pair)
        demand(fine, name, pair, "a pair of numbers")
    demand(total % seq_len == 0, "TOTAL_BATCH_SIZE", total, f"a multiple of MAX_SEQ_LEN ({seq_len})")
    # Half of a step has to be whole batches, too, where its rows are even
    in_two = knob("HALF_BATCH_RATIO", kind) and total // seq_len % 2 == 0
    rows = min(rows, total // seq_len // (2 if in_two else 1))
    demand(total % (rows * seq_len) == 0, "TOTAL_BATCH_SIZE", total, "a multiple of "
           f"DEVICE_BATCH_SIZE ({rows}) x MAX_SEQ_LEN ({seq_len}) = {rows * seq_len}, or change it")
    windows = window_sizes(knob("WINDOW_PATTERN", kind), depth, knob("SHORT_WINDOW", kind, 0), seq_len)
    shifted = knob("SHIFTED_CHANNELS", kind, 0)
    demand(shifted <= n_embd, "SHIFTED_CHANNELS", shifted, f"at most the width, {n_embd}")
    config = GPTConfig(vocab_size, seq_len, depth, n_head, n_head // shared, n_embd, windows,
                       knob("BIGRAM_ROWS", kind, 0), shifted)
    return config, total, rows


def build(config, device, dtype, compiled, seed):
    """(model, optimizer) on the device, initialised from the seed; tables in the compute dtype."""
    torch.manual_seed(seed)
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("warn")  # torch.empty then gives NaN
    with torch.device(device):
        model = GPT(replace(config, table_dtype=dtype))
    torch.set_deterministic_debug_mode(before)
    torch.manual_seed(seed)  # again: what a new part drew above moves no other part's weights
    model.init_weights()
    tensors = [*model.named_parameters(), *model.named_buffers()]
    # A sum is NaN where one element is; isnan of a whole table takes 3 GB. torch adds no fp8
    if empty := [name for name, tensor in tensors
                 if (tensor if tensor.dtype.itemsize == 1 else tensor.sum()).isnan().any()]:
        raise prepare.Failure(f"{', '.join(empty)}: NaN, or left as torch.empty made it; "
                              "fill it where it is made")
    places = [p.data_ptr() for p in model.parameters()]
    if shared := [name for name, p in model.named_parameters() if places.count(p.data_ptr()) > 1]:
        raise prepare.Failure(f"{', '.join(shared)}: they share memory; to tie weights, "
                              "assign the parameter itself, not its .data")
    # A view's storage holds more than it shows, and AdamW on a CPU would step that too
    if strided := [name for name, p in model.named_parameters() if not p.is_contiguous()]:
        raise prepare.Failure(f"{', '.join(strided)}: a strided view; add .contiguous() to it")
    return model, MuonAdamW(parameter_groups(model), compiled, dtype)


def train_step(model, optimizer, batches):
    """Accumulate gradients over the batches, step, return the mean loss, a detached 0-D tensor."""
    mean_loss = 0
    for x, y, *_ in batches:
        loss = model(x, y) / len(batches)
        loss.backward()
        mean_loss = mean_loss + loss.detach()
    # To clip, leave out the hashed tables: torch takes no norm of a list with sparse gradients
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return mean_loss


def watch_weights(model):
    """Return a function that names the parameters that are to train and still are as now."""
    def sums():  # in float32: what changes moves them, and no table is copied
        return {name: p.detach().sum(dtype=torch.float32).item()
                for name, p in model.named_parameters() if p.requires_grad}

    before = sums()
    return lambda: [name for name, now in sums().items() if now == before.get(name)]


def stray_gradients(model):
    """Shapes of the tensors that have a gradient and are no parameters of the model."""
    ours = set(model.parameters())
    return [tuple(t.shape) for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter)
            and t.is_leaf and t.grad is not None and t not in ours]


def summary(results):
    """The block that ends a run: one `name: value` line each, values aligned."""
    return "\n".join(["---", *(f"{name + ':':<17} {value}" for name, value in results.items())])


def quick_start(kind):
    """Settings that save seconds before the clock, and in every step."""
    torch.set_float32_matmul_precision("high")
    if knob("COMPILE", kind):  # the compiler's worker processes take seconds to start
        from torch._inductor.async_compile import maybe_warm_pool
        maybe_warm_pool()
    if kind == "cuda":  # the CPU has little to do: waking a hundred threads would take longer
        torch.set_num_threads(min(16, torch.get_num_threads()))
    gc.disable()  # garbage collection stalls steps, and compilation; main collects now and then


def on_host(loss):
    """Begin to copy a loss to the host; returns a function that gives the number."""
    if not loss.is_cuda:
        return loss.item
    copy, copied = loss.to("cpu", non_blocking=True), torch.cuda.Event()
    copied.record()

    def read():
        copied.synchronize()  # loss.item() would wait for every queued kernel, not just this step's
        return copy.item()

    return read


def finite(loss, step):
    if not loss <= 100:
        raise prepare.Failure(f"loss {loss:.6g} at step {step} (NaN, infinite or above 100: "
                              "training diverged; lower a learning rate or undo the last change)")
    return loss


def log_line(step, loss, elapsed, steps, seconds, tokens, epoch, budget, flops, peak_flops):
    """One line of progress. steps, seconds, tokens: since the last one; flops: per token;
    peak_flops: None where it is not known.

    The loss has MTP_WEIGHT's part in it, which goes at half of the budget.
    """
    mfu = f"{100 * flops * tokens / (seconds * peak_flops):.1f}%" if peak_flops else "n/a"
    return (f"step {step:05d} ({min(100 * elapsed / budget, 100):.1f}%) | loss: {loss:.6f} | "
            f"lrm: {lr_multiplier(elapsed / budget):.2f} | dt: {1000 * seconds / steps:.0f}ms | "
            f"tok/sec: {tokens / seconds:,.0f} | mfu: {mfu} | epoch: {epoch} | "
            f"remaining: {max(budget - elapsed, 0):.0f}s")


def main():
    began = time.monotonic()
    if len(sys.argv) > 1:
        raise prepare.Failure(f"train.py takes no arguments, but got {sys.argv[1:]}; edit its knobs instead")
    contract, why = prepare.active_contract()
    print(prepare.describe(contract, why))
    split, T, budget = prepare.active_split(), contract.max_seq_len, contract.time_budget
    seed = os.environ.get("SEED") or "42"
    fine = seed.isdecimal() and len(seed) < 20 and int(seed) < 2**63
    demand(fine, "SEED", seed, "a whole number below 2**63, or unset it")
    seed = int(seed)

    # Device, precision, sizes, attention
    device = prepare.default_device()
    kind = device.type
    config, total_batch_size, device_batch_size = sizes(kind, T, contract.vocab_size)
    half_until, mtp_weight = knob("HALF_BATCH_RATIO", kind), knob("MTP_WEIGHT", kind)
    quick_start(kind)
    dtype = compute_dtype(device)
    # No cache: a second step in one `with autocast` would work with the weights before the first
    autocast = torch.autocast(kind, torch.bfloat16, enabled=dtype == torch.bfloat16,
                              cache_enabled=False)
    backend, reason = choose_attention(device, ATTENTION)
    device_name = prepare.device_name(device)
    print(f"device: {device_name}, {str(dtype).removeprefix('torch.')}\nattention: {backend} ({reason})")
    if BUSY:
        print("note: other programs use this machine's cores. Stop them for more steps; threads "
              "now wait without spinning (OMP_WAIT_POLICY=PASSIVE)")

    # Data and model
    tokenizer = prepare.prepare(contract)
    config = replace(config, vocab_size=tokenizer.get_vocab_size())  # fewer, of little text
    if knob("COMPILE", kind):
        compile_parts()
    print("warm-up")

    # Warm-up on random tokens compiles, finds the batch that fits and tries the exam's probes
    new_model = functools.partial(build, config, device, dtype, knob("COMPILE", kind), seed)
    fits = False
    while not fits:
        grad_accum_steps = total_batch_size // (device_batch_size * T)
        try:
            model, optimizer = new_model()
            unchanged = watch_weights(model)
            for i in range(WARMUP_STEPS):
                idx = torch.randint(config.vocab_size, (device_batch_size, T + 1), device=device)
                batch = (idx[:, :-1].contiguous(), idx[:, 1:].contiguous())
                count = batches_per_step(grad_accum_steps, min(i, 1), half_until)  # half, then all
                with autocast:
                    train_step(model, optimizer, [batch] * count).item()
            with autocast:
                prepare.check_model(model, device_batch_size)
            fits = True
            if idle := unchanged():
                print(f"note: not trained in warm-up: {', '.join(idle)}")
            if loose := stray_gradients(model):
                print(f"note: gradients of tensors that are no parameters of the model: {loose}; "
                      "modules in a list? Use nn.ModuleList")
        except RuntimeError as error:
            if not prepare.is_out_of_memory(error):
                raise
            if device_batch_size == 1:
                raise prepare.Failure("out of memory with one row at once: lower BIGRAM_ROWS or "
                                      f"DEPTH ({' '.join(str(error).split())[:200]})") from error
        # Outside the except block, whose exception keeps the failed step's tensors alive
        model = optimizer = unchanged = None
        gc.collect()
        if not fits:
            torch.cuda.empty_cache()
            smaller = range(device_batch_size // 2, 0, -1)
            device_batch_size = next(n for n in smaller if total_batch_size % (n * T) == 0)
            print(f"out of memory: now DEVICE_BATCH_SIZE is {device_batch_size}, with "
                  f"{total_batch_size // (device_batch_size * T)} batches per step")
    model, optimizer = new_model()  # no trace of warm-up
    n_params = sum(p.numel() for p in model.parameters())
    at_first = batches_per_step(grad_accum_steps, 0, half_until) * device_batch_size * T
    print(f"model: {n_params / 1e6:.1f} M parameters, {config.n_layer} layers, "
          f"width {config.n_embd}, {config.n_head} heads of {config.n_embd // config.n_head}; "
          f"{total_batch_size:,} tokens per step"
          + f" ({at_first:,} until {half_until:.0%})" * (at_first < total_batch_size)
          + f", {device_batch_size} rows at once")
    gc.freeze()  # collections look at nothing made so far
    if kind == "cuda":
        torch.cuda.reset_peak_memory_stats()

    # The clock: every step counts
    loader = prepare.make_dataloader(tokenizer, device_batch_size, T, "train", device=device)
    flops = model.flops_per_token()
    words = f"{device_name} ".replace("-", " ")
    peak_flops = next((peak for card, peak in PEAK_FLOPS.items() if f"{card} " in words), None)
    log_seconds = max(LOG_SECONDS, budget / 100)  # a log stays under 20 kB
    lag = 1 if kind == "cuda" else 0  # a GPU runs a step while the host reads the last one's loss
    unread = []  # steps that were begun: (a function that reads the loss, tokens)
    step = done = logged = tokens = logged_tokens = 0  # done, tokens: steps whose loss was read
    elapsed = logged_at = 0.0
    unchanged = watch_weights(model)
    print(f"training for {budget:g} s")
    getattr(torch, kind).synchronize()  # torch.cuda's, torch.mps's or torch.cpu's, a no-op
    start = time.monotonic()
    while elapsed < budget or unread:
        if elapsed < budget:  # begin a step
            count = batches_per_step(grad_accum_steps, elapsed / budget, half_until)
            batches = [next(loader) for _ in range(count)]
            set_schedules(optimizer, step, elapsed / budget)
            model.mtp_weight.fill_(mtp_weight * max(0.0, 1 - 2 * elapsed / budget))
            with autocast:
                read = on_host(train_step(model, optimizer, batches))
            unread.append((read, sum(x.numel() for x, *_ in batches)))
            step += 1
        if len(unread) > lag or elapsed >= budget:  # end one
            read, taken = unread.pop(0)
            done, tokens = done + 1, tokens + taken
            loss = finite(read(), done)
        elapsed = time.monotonic() - start
        last = elapsed >= budget and not unread
        if done == 1 or last or done and elapsed - logged_at >= log_seconds:
            print(log_line(done, loss, elapsed, done - logged, elapsed - logged_at,
                           tokens - logged_tokens, batches[-1][2], budget, flops, peak_flops))
            logged, logged_at, logged_tokens = done, elapsed, tokens
            gc.collect()  # an edit may leave cycles, which hold activations

    # Exam and summary
    if idle := unchanged():
        print(f"note: not trained: {', '.join(idle)}")
    if batches[-1][2] > 1 and contract.train_files > 1:
        print("note: the training text began again. What the hashed tables read twice they "
              "remember: prepare more shards (--num-shards), or lower BIGRAM_ROWS")
    print(f"exam: {contract.eval_tokens:,} targets, and the probes")
    with autocast:
        bpb = prepare.evaluate_bpb(model, tokenizer, device_batch_size)
    peak_mb, tokens_m = prepare.peak_memory_mb(device), tokens / 1e6
    print(summary({
        f"{split}_bpb": f"{bpb:.6f}",
        "training_seconds": f"{elapsed:.1f}",
        "total_seconds": f"{time.monotonic() - began:.1f}",
        "peak_vram_mb": f"{peak_mb:.1f}" if peak_mb else "n/a",
        "mfu_percent": f"{100 * flops * tokens / (elapsed * peak_flops):.2f}" if peak_flops else "n/a",
        "total_tokens_M": f"{tokens_m:.1f}" if tokens_m >= 100 else f"{tokens_m:.3f}",
        "num_steps": step,
        "num_params_M": f"{n_params / 1e6:.1f}",
        "depth": config.n_layer,
        "seed": seed,
        "contract": prepare.fingerprint(contract),
        "device": device_name,
        "attention": backend,
        "next": "this run's record is the last line of runs.jsonl; how an agent goes on: README.md, The loop",
    }))


if __name__ == "__main__":
    prepare.run_main(main)
