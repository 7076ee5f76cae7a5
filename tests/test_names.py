"""The names of the published design: a train.py written against them alone runs here and is scored."""

import hashlib

from conftest import ROOT, evidence, run

# Its own model, optimizer and loop, at module level without a guard, as such files are
SCRIPT = """
import time
import torch
import torch.nn as nn
import torch.nn.functional as F
from prepare import EVAL_TOKENS, MAX_SEQ_LEN, TIME_BUDGET, Tokenizer, evaluate_bpb, get_token_bytes, make_dataloader

DEVICE_BATCH_SIZE = 16
device = torch.device("cpu")
torch.manual_seed(42)


class Model(nn.Embedding):
    def forward(self, idx, targets=None, reduction="mean"):
        logits = super().forward(idx)
        return logits if targets is None else F.cross_entropy(logits.mT, targets, reduction=reduction)


tokenizer = Tokenizer.from_directory()
vocab_size, bos = tokenizer.get_vocab_size(), tokenizer.get_bos_token_id()
assert tokenizer.encode("a b", prepend=bos)[0] == bos and len(tokenizer.encode(["a", "b"])) == 2
assert tokenizer.decode(tokenizer.encode("a b")) == "a b"
assert get_token_bytes(device).shape == (vocab_size,) and EVAL_TOKENS > 0
assert torch.equal(get_token_bytes(device), tokenizer.get_token_bytes(device))
train_loader = make_dataloader(tokenizer, DEVICE_BATCH_SIZE, MAX_SEQ_LEN, "train")
x, y, epoch = next(train_loader)  # the first batch is drawn ahead
model = Model(vocab_size, vocab_size)  # what follows each token
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)
start = time.time()
while time.time() - start < TIME_BUDGET:
    loss = model(x, y)
    x, y, epoch = next(train_loader)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
val_loader = make_dataloader(tokenizer, DEVICE_BATCH_SIZE, MAX_SEQ_LEN, "val")
while next(val_loader)[2] < 2:  # it does not end
    pass
model.eval()
print(f"val_bpb:          {evaluate_bpb(model, tokenizer, DEVICE_BATCH_SIZE):.6f}")
"""


def test_a_train_py_of_the_published_design_runs_and_is_scored(demo, tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    done = run("train.py", cwd=tmp_path, PYTHONPATH=str(ROOT), AUTORESEARCH_TIME_BUDGET="1", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    bpb = float(done.stdout.split("val_bpb:")[1])
    (line,) = evidence()
    assert abs(line["bpb"] - bpb) < 1e-6 and 1 < bpb < 5
    assert (line["split"], line["script"]) == ("val", "train.py")
    assert line["train_sha256"] == hashlib.sha256(SCRIPT.encode()).hexdigest()
