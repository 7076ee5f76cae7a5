"""README.md and program.md: every command runs in a scratch clone, what they say of the code is so.

The clone is a git repository of its own with the files of the working tree, but a smaller model, the
demo contract and a budget of a second.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, evidence, smaller

import prepare
import train

README, PROGRAM = (ROOT / "README.md").read_text(), (ROOT / "program.md").read_text()
HEADER = "commit\tval_bpb\tmemory_gb\tstatus\tdescription\n"

# Commands of the README: where they run
NETWORK = {  # they would download: their arguments are checked up to the point where that begins
    "uv run prepare.py --contract tinystories": ("tinystories", None),
    "uv run prepare.py --contract climbmix --num-shards 10": ("climbmix", 10),
}
RUNS = {  # beginning of a command: the file that runs it, and how it does
    "AUTORESEARCH_SPLIT=test": ("tests/test_docs.py", "readme_command("),
    "uv run prepare.py --contract demo": ("tests/conftest.py", 'run("prepare.py", "--contract", "demo"'),
    "pip install uv": (".ci/run", "pip install --quiet uv"),
    "uv run train.py": ("tests/test_scale.py", '"uv run train.py"'),
    "uv run tests/bench_step.py": ("tests/test_docs.py", "readme_command("),
    "uv run pytest": (".ci/run", "uv run pytest -n 2"),
    "uv run ruff check .": (".ci/run", "uv run ruff check ."),
    "uv run jupyter nbconvert": ("tests/test_notebook.py", "readme_command("),
    "git worktree add": ("tests/test_scale.py", "readme_command("),
    "(cd ../autoresearch-1": ("tests/test_scale.py", "readme_command("),
    "uv venv": ("tests/test_install.py", '"uv venv"'),  # not here: it would clear the environment that runs the tests
    "uv pip install --torch": ("tests/test_install.py", '"uv pip install --torch"'),
    "export UV_NO_SYNC": ("tests/test_install.py", '"export UV_NO_SYNC"'),
    'uvx --from "ray[default]"': ("tests/test_scale.py", "readme_command("),  # needs Ray, and a GPU: there it uses CPU
}


def blocks(text: str) -> list[str]:
    return re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


COMMANDS = "".join(blocks(README)).splitlines()


def readme_command(beginning: str) -> str:
    """The one command of the README that begins so."""
    (command,) = {line for line in COMMANDS if line.startswith(beginning)}
    return command


def block(part: str) -> str:
    """The one block of program.md that holds `part`."""
    (found,) = (block for block in blocks(PROGRAM) if part in block)
    return found


def inline(beginning: str) -> str:
    """The one `command` in the running text of program.md that begins so."""
    (found,) = set(re.findall(rf"`({re.escape(beginning)}[^`]*)`", PROGRAM))
    return found


def environment(cache: Path, **more: str) -> dict[str, str]:
    """For commands in a scratch clone: uv takes the environment that runs these tests and downloads nothing."""
    assert shutil.which("uv"), "these tests run the README's commands: pip install uv"
    env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "SEED", "UV_", "GIT_"))}
    env.pop("VIRTUAL_ENV", None)
    return env | {
        "AUTORESEARCH_CACHE": str(cache), "AUTORESEARCH_CONTRACT": "demo", "AUTORESEARCH_TIME_BUDGET": "1",
        "UV_NO_SYNC": "1", "UV_OFFLINE": "1", "UV_PROJECT_ENVIRONMENT": sys.prefix, "OMP_WAIT_POLICY": "PASSIVE",
        "GIT_CONFIG_GLOBAL": os.devnull, "GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a",
        "GIT_COMMITTER_EMAIL": "a@b", "PYTHONDONTWRITEBYTECODE": "1",
    } | more


def scratch_clone(folder: Path) -> Path:
    """A git repository of one commit that holds what a clone of this one would, with a smaller model."""
    folder.mkdir()
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():  # listed, and not deleted since
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    (folder / "train.py").write_text(smaller((folder / "train.py").read_text()))
    shell("git init -q && git add -A && git commit -q -m clone", folder, environment(folder))
    return folder


def shell(command: str, folder: Path, env: dict[str, str], code: int = 0) -> str:
    done = subprocess.run(["bash", "-c", command], cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def keep_a_model(train_py: str) -> str:
    """The text of train.py with the README's lines that keep a model and sample from it."""
    (lines,) = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    before, after = train_py.split("    peak_mb, tokens_m =")
    return f"{before}{lines}    peak_mb, tokens_m ={after}"


def table(text: str, first_cell: str) -> dict[str, list[str]]:
    """Rows of the table whose header has `first_cell` somewhere, by their first cells."""
    lines = text[text.index(first_cell):].split("\n\n")[0].splitlines()
    rows = [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return {row[0]: row[1:] for row in rows}


# ----------------------------------------------------------------------------------------------------------------------
# README


@pytest.mark.parametrize("command", NETWORK)
def test_the_command_of_the_readme_that_downloads_asks_for_what_it_names(command, monkeypatch):
    assert command in COMMANDS
    asked = []
    monkeypatch.setattr(sys, "argv", [*command.removeprefix("uv run ").split(), "--download-workers", "3"])
    monkeypatch.setattr(prepare, "prepare", lambda contract, *more: asked.append((contract.name, *more)))
    monkeypatch.setattr(prepare, "fingerprint", lambda contract: contract.name)
    prepare.cache_dir().mkdir()
    prepare.main()
    assert asked == [(*NETWORK[command], 3)]
    assert (prepare.cache_dir() / "active").read_text() == NETWORK[command][0]


def test_the_command_of_the_readme_scores_the_held_out_split(tmp_path, demo_cache):
    command = readme_command("AUTORESEARCH_SPLIT=test")
    output = shell(command, scratch_clone(tmp_path / "clone"), environment(demo_cache))
    assert re.search(r"^---\ntest_bpb: +\d\.\d{6}$", output, re.MULTILINE)


def test_every_command_of_the_readme_runs_somewhere():
    assert [c for c in COMMANDS if c not in NETWORK and not c.startswith(tuple(RUNS))] == []
    for beginning, (file, how) in RUNS.items():
        how = f"{how}{beginning!r}".replace("'", '"') if how.endswith("(") and '"' not in beginning else how
        assert readme_command(beginning) and how in (ROOT / file).read_text()


def test_the_contracts_and_sizes_in_the_readme_are_those_of_the_code():
    rows = table(README, "| | `climbmix`")
    assert rows[""] == list(prepare.CONTRACTS)
    for column, contract in enumerate(prepare.CONTRACTS.values()):
        sizes = f"{contract.max_seq_len}, {contract.vocab_size}"
        expected = [contract.dataset, sizes, str(contract.time_budget), f"{contract.eval_tokens:,}"]
        names = "data", "context, vocabulary (tokens)", "training, seconds", "targets scored"
        assert [rows[name][column] for name in names] == expected
    rows = table(README, "| device | contract")
    for row, kind in (("H200", "cuda"), ("2 CPU cores", "cpu")):
        exponent = train.TOTAL_BATCH_SIZE[kind].bit_length() - 1
        assert rows[row][1:3] == [str(train.DEPTH[kind]), f"2^{exponent}"]


@pytest.mark.parametrize("text", [README, PROGRAM], ids=["README.md", "program.md"])
def test_constants_variables_and_files_named_in_prose_exist(text):
    sources = "".join((ROOT / name).read_text() for name in ("prepare.py", "train.py"))
    foreign = {"CUDA_VISIBLE_DEVICES", "LC_ALL", "OMP_WAIT_POLICY", "RAY_API_SERVER_ADDRESS", "UV_NO_CONFIG",
               "UV_NO_SYNC"}
    for name in set(re.findall(r"\b[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+\b", text)) - foreign:
        known = any(name in vars(module) for module in (prepare, train)) or f'"{name}"' in sources
        assert known, f"{name} is neither a constant nor a variable that the code reads"
    made = {"results.tsv", "runs.jsonl", "run.log", "notes.md"}
    ignored = set((ROOT / ".gitignore").read_text().split())
    assert made | {"uv.lock", "logs/"} <= ignored
    for name in set(re.findall(r"`([\w.]+\.(?:py|md|ipynb|toml|tsv|jsonl|log))`", text)) - made:
        assert (ROOT / name).is_file(), name


# ----------------------------------------------------------------------------------------------------------------------
# program.md


def example() -> dict[str, str]:
    """The summary that program.md shows, by names."""
    (shown,) = re.findall(r"^```\n(---\n.*?)^```$", PROGRAM, re.MULTILINE | re.DOTALL)
    results = dict(re.split(r": +", line, maxsplit=1) for line in shown.splitlines()[1:])
    assert shown == train.summary(results) + "\n"
    return results


def test_program_md_fits_on_a_page_and_a_half_and_shows_the_summary_as_the_code_prints_it():
    assert len(PROGRAM.splitlines()) <= 130 and max(map(len, PROGRAM.splitlines())) <= 120
    assert list(example())[:2] == ["val_bpb", "training_seconds"]


def test_a_session_by_the_book_baseline_discard_crash_keep(tmp_path, demo_cache, monkeypatch):
    """Every block of program.md, in the order in which an agent meets them; one real run, others made up."""
    folder, env = scratch_clone(tmp_path / "clone"), environment(demo_cache)
    train_py, results, used = folder / "train.py", folder / "results.tsv", set()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(prepare, "HERE", folder)

    def do(part: str, variables: str = "") -> str:
        """Run a block, with other values in the line of variables with which it begins."""
        used.add(block(part))
        first, others = block(part).split("\n", 1)
        return shell(f"{variables or first}\n{others}", folder, env)

    def head() -> str:
        return shell("git rev-parse --short=7 HEAD", folder, env).strip()

    def attempt(code: str) -> str:
        train_py.write_text(code)
        do("git commit -q -m \"what")
        return head()

    def run(seed: int = 42) -> str:
        do("nohup", f"SEED={seed}")
        return do("until tail")

    def pretend(bpb: str, seed: int = 42) -> None:
        """The log and the evidence of a run of HEAD that scored this."""
        results = example() | {"val_bpb": bpb, "seed": seed, "peak_vram_mb": "2048.0"}
        (folder / "run.log").write_text(train.summary(results) + "\nexit 0\n")
        facts = {"commit": shell("git rev-parse HEAD", folder, env).strip(), "seed": seed, "bpb": float(bpb)}
        with open(folder / "runs.jsonl", "a") as file:
            file.write(json.dumps(first | facts) + "\n")

    def verdict() -> str:
        return prepare.verdict().rpartition("verdict: ")[2]

    # Setup, on the day's second branch; a commit that cannot be made is found before the night
    shell("git branch autoresearch/$(date +%Y-%m-%d)", folder, env)
    output = do("git checkout -b")
    assert "ready: demo-" in output and re.search(r"^\* autoresearch/\d{4}-\d\d-\d\d-2$", output, re.MULTILINE)
    assert results.read_text() == HEADER and not shell("git status --short", folder, env)
    setup = block("git checkout -b").splitlines()
    assert "no commit" in shell(setup[2], folder, env | {"GIT_AUTHOR_NAME": ""}) and "--allow-empty" in setup[2]
    shell(f"printf kept >> {results}; {setup[4]}", folder, env)
    assert results.read_text() == HEADER + "kept"  # an earlier session's rows survive, and the end of a line is mended

    # Four baselines, the first for real
    baseline, original = head(), train_py.read_text()
    assert run() == "exit 0\n"
    assert do("grep -A").startswith("val_bpb:")
    printed = dict(re.findall(r"^(\w+): +(.+)$", (folder / "run.log").read_text().split("\n---\n")[1], re.MULTILINE))
    assert list(printed) == list(example())
    do("printf '%s\\t", "status=keep text=baseline")
    kept, row = results.read_text().splitlines()[1:]
    commit, bpb, memory, status, text = row.split("\t")
    assert (kept, commit, bpb, status, text) == ("kept", baseline, printed["val_bpb"], "keep", "baseline")
    assert re.fullmatch(r"\d+\.\d", memory)
    assert f"val_bpb:          {bpb}" in (folder / "logs" / f"{baseline}.log").read_text()
    (first,) = evidence(folder)
    for seed, more in ((43, 0.2), (42, 0.1), (43, 0.2)):
        pretend(f"{float(bpb) + more:.6f}", seed)
        do("printf '%s\\t", "status=keep text=baseline")
    assert f"verdict: {verdict()}" in do("--verdict") and verdict().startswith("this is the best")
    assert "noise: 0.150000" in (folder / "run.log").read_text()
    do("git reset -q")  # restoring a kept commit changes nothing
    assert head() == baseline and not shell("git tag", folder, env)

    # Worse: discarded, its code stays readable, other people's edits stay where they are
    (folder / "README.md").write_text("an edit of a human")
    worse = attempt(original + "# worse\n")
    pretend("8.000000")
    do("printf '%s\\t")
    assert results.read_text().splitlines()[-1] == f"{worse}\t8.000000\t2.0\tdiscard\twhat was tried"
    timing = readme_command("uv run tests/bench_step.py")
    assert inline("uv run tests/bench_step.py") == timing.replace("HEAD", "KEPT")
    timed = shell(timing.replace("HEAD", baseline), folder, env)
    assert re.search(rf"^a token of train\.py / of {baseline}: \d\.\d{{3}} \(", timed, re.MULTILINE)
    (checkout,) = re.findall("git checkout [^&]*", block("git checkout -q"))
    shell(f"kept={baseline}; {checkout}", folder, env)  # killed in the middle of the restore...
    do("git reset -q")  # ...and resumed
    do("git reset -q")
    assert head() == baseline and train_py.read_text() == original
    assert shell("git status --short", folder, env) == " M README.md\n"
    assert shell(f"git show tried/{worse}:train.py", folder, env) == original + "# worse\n"

    # A crash: fixed once with --amend, still broken, a row with empty cells
    before = attempt("raise RuntimeError('too wide')\n")
    train_py.write_text("raise RuntimeError('still too wide')\n")
    shell(inline("git commit -q --amend"), folder, env)
    crashed = head()
    assert crashed != before
    assert run() == "exit 1\n"
    assert "RuntimeError: still too wide" in do("grep -A")
    do("printf '%s\\t", "status=crash text='too wide'")
    pretend("0.400000")  # a run that breaks after its summary is a crash too
    do("printf '%s\\t", "status=crash text='too wide'")
    assert results.read_text().splitlines()[-2:] == [f"{crashed}\t\t\tcrash\ttoo wide"] * 2
    do("git reset -q")
    assert head() == baseline and train_py.read_text() == original

    # A run that hangs is ended, with all its children
    attempt("import time\ntime.sleep(300)\n")
    do("nohup")
    assert "train.py" in shell(inline("ps -o"), folder, env)
    shell(inline("kill -- -"), folder, env)
    shell(f"while {inline('ps -o')}; do sleep 0.1; done", folder, env)
    do("printf '%s\\t", "status=crash text=hangs")
    do("git reset -q")

    # The last kept row is of another branch: nothing is restored
    elsewhere = shell("git commit-tree -m other HEAD^{tree}", folder, env).strip()
    attempt(original + "# elsewhere\n")
    before = results.read_text()
    with open(results, "a") as ledger:
        ledger.write(f"{elsewhere[:7]}\t0.1\t1.0\tkeep\tof another branch\n")
    assert f"not restored: see the row of {elsewhere[:7]}" in do("git reset -q") and head() != baseline
    # Two summaries in a log: the first score; a status in bold, a keep that was taken back
    pretend("0.700000")
    (folder / "run.log").write_text((folder / "run.log").read_text() * 2)
    do("printf '%s\\t", "status=discard text=elsewhere")
    results.write_text(before + results.read_text().splitlines()[-1] + "\n" + "".join(
        f"{commit}\t1.0\t1.0\t {status}\tby hand\n"
        for commit, status in ((baseline, "**keep**"), (elsewhere, "keep"), (elsewhere[:7], "discard"))))
    assert "\t0.700000\t2.0\tdiscard\telsewhere\n" in results.read_text()
    do("git reset -q")
    assert head() == baseline and train_py.read_text() == original
    results.write_text(before)

    # Killed during an edit: dropped. Then a large gain, which stays
    train_py.write_text("half an ed")
    shell(inline("git checkout HEAD"), folder, env)
    assert train_py.read_text() == original
    better = attempt(original + "# better\n")
    pretend("0.500000")
    do("printf '%s\\t", "status=keep text=better")

    # A small gain over it: the best commit's second seed, then this one's
    smaller = attempt(original + "# better\n# smaller\n")
    pretend("0.400000")
    assert verdict().startswith(f"run BEST under SEED=43 ({better}")
    do("printf '%s\\t", "status=discard text='smaller, to confirm'")
    do("git reset -q")
    assert head() == better and train_py.read_text() == original + "# better\n"
    pretend("0.600000", 43)
    do("printf '%s\\t", "status=keep text=re-run")
    shell(inline("git merge").replace("HASH", smaller), folder, env)
    assert head() == smaller and train_py.read_text() == original + "# better\n# smaller\n"
    pretend("0.500000", 43)
    assert verdict() == "keep"
    do("printf '%s\\t", "status=keep text=smaller")
    assert results.read_text().endswith(f"{smaller}\t0.500000\t2.0\tkeep\tsmaller, SEED=43\n")

    # A baseline measured again is not the last that was kept, and a re-run that broke off takes no keep back
    with open(results, "a") as ledger:
        ledger.write(f"{baseline}\t1.5\t1.0\tkeep\tbaseline again\n{smaller}\t\t\tcrash\tre-run\n")

    # The machine had been slower: an amended attempt begins without scores, a new baseline is a commit of its own
    slow = attempt(train_py.read_text() + "# slow\n")
    pretend("0.900000")
    time.sleep(1)  # a hash holds the second
    shell(inline("git commit -q --amend"), folder, env)
    slow, first = head(), slow
    assert slow != first
    do("git reset -q")
    assert head() == smaller
    shell(inline("git commit -q --only --allow-empty"), folder, env)
    shell(inline("git cherry-pick").replace("HASH", slow), folder, env)
    assert train_py.read_text().endswith("# slow\n")

    # What the human finds in the morning: kept commits in the log, every run in the table, nothing of it committed
    assert shell("git log --format=%h --abbrev=7 HEAD~2", folder, env).split()[:3] == [smaller, better, baseline]
    assert [row.split("\t")[3] for row in results.read_text().splitlines()[2:]] == [
        *["keep"] * 4, "discard", *["crash"] * 3, "keep", "discard", *["keep"] * 3, "crash"]
    assert shell("git status --short", folder, env) == " M README.md\n"
    assert used == set(blocks(PROGRAM)), "a block of program.md is not part of this session"
