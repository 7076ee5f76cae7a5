"""Outgrowing one GPU: the README's recipes for worktrees and for Ray, run for real on CPU with the demo contract."""

import os
import shutil
import subprocess
import sys
import tempfile

import pytest
from conftest import evidence
from test_docs import README, environment, keep_a_model, readme_command, scratch_clone, shell

RAY = "ray[default]==2.60.0"


@pytest.mark.worktree
def test_two_worktrees_experiment_at_once_and_share_nothing_but_the_cache_and_the_history(tmp_path, demo_cache):
    first, second = scratch_clone(tmp_path / "first"), tmp_path / "autoresearch-1"
    env = environment(demo_cache, OMP_NUM_THREADS="1")
    shell(readme_command("git worktree add"), first, env)
    train_py = (first / "train.py").read_text()
    for folder, branch in ((first, "autoresearch/a"), (second, "autoresearch/b")):
        (folder / "train.py").write_text(f"{keep_a_model(train_py)}# {branch}\n")
        shell(f"git checkout -q -b {branch} && git commit -q -m {branch} -- train.py", folder, env)
    commands = {first: "uv run train.py", second: readme_command("(cd ../autoresearch-1")}
    runs = [subprocess.Popen(["bash", "-c", command], cwd=first, env=env | {"SEED": seed}, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            for command, seed in zip(commands.values(), ("1", "2"))]
    outputs = [run.communicate(timeout=300)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs

    (one,), (two,) = map(evidence, commands)
    assert (one["seed"], two["seed"]) == (1, 2)
    assert one["contract"] == two["contract"]
    for line, folder, output in zip((one, two), commands, outputs):
        assert line["commit"] == shell("git rev-parse HEAD", folder, env).strip() and not line["dirty"]
        assert f"val_bpb:          {line['bpb']:.6f}" in output
        assert len(output.split("and the probes\n")[1].split("\n---\n")[0]) > 100  # what its model writes
        assert (folder / "model.pt").stat().st_size > 10**5
        assert not shell("git status --short", folder, env)
    assert one["commit"] != two["commit"] and one["train_sha256"] != two["train_sha256"]
    assert shell("git log -1 --format=%s autoresearch/b", first, env) == "autoresearch/b\n"  # each can read the other's


INSIDE = """
ip link set lo up
uvx --from '{ray}' ray start --head --block --node-ip-address=127.0.0.1 --num-cpus=1 > "$RAY_TMPDIR/head.log" 2>&1 &
for _ in $(seq 90); do
    "{python}" -c 'import urllib.request as r; r.urlopen("http://127.0.0.1:8265/api/version")' 2> /dev/null && break
    sleep 1
done
{submit}
"""


@pytest.mark.ray
def test_ray_runs_the_same_command_and_shows_the_same_log(tmp_path, demo_cache):
    """In a network namespace of its own that has only a loopback: Ray's ports listen on every address that there is."""
    if not shutil.which("unshare") or subprocess.run(["unshare", "-Urnpf", "--mount-proc", "true"]).returncode:
        pytest.skip("needs Linux and the right to make a namespace, so that Ray stays on loopback")
    folder = scratch_clone(tmp_path / "clone")
    submit = readme_command('uvx --from "ray[default]" ray job submit').replace("ray[default]", RAY)
    assert "--entrypoint-num-gpus 1" in submit  # without a GPU that would wait for ever
    submit = submit.replace("--entrypoint-num-gpus 1", "--entrypoint-num-cpus 1")
    subprocess.run(["uvx", "--from", RAY, "ray", "--version"], check=True, timeout=600)  # downloads; then offline
    temporary = tempfile.mkdtemp(prefix="ray-")  # short: Ray puts sockets there
    env = environment(demo_cache, RAY_TMPDIR=temporary, RAY_USAGE_STATS_ENABLED="0", no_proxy="127.0.0.1",
                      RAY_API_SERVER_ADDRESS="http://127.0.0.1:8265")
    try:
        script = INSIDE.format(ray=RAY, python=sys.executable, submit=submit)
        namespace = ["unshare", "-Urnpf", "--mount-proc", "--kill-child", "bash", "-c", script]
        done = subprocess.run(namespace, cwd=folder, env=env, capture_output=True, text=True, timeout=400)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = done.stdout.split("\n---\n")[1].splitlines()
    assert summary[0].startswith("val_bpb:") and any(line.startswith("contract:         demo-") for line in summary)
    assert "succeeded" in done.stdout
    assert not os.path.exists(folder / "runs.jsonl")  # it is in the job's folder
    assert "stays in the job's folder" in " ".join(README.split())
