"""analysis.ipynb: it survives every results.tsv that occurs, counts right, and draws a picture that can be read."""

import itertools
import json
import random
import shutil

import matplotlib.pyplot as plt
import pytest
from conftest import ROOT
from matplotlib.colors import to_hex
from matplotlib.text import Text
from test_docs import environment, readme_command, shell

NAN, HEADER = float("nan"), "commit\tval_bpb\tmemory_gb\tstatus\tdescription"
NOTEBOOK = json.loads((ROOT / "analysis.ipynb").read_text())
# What program.md's loop wrote on four H100s, in a worktree each; the four baselines are in every ledger
NIGHTS = [[(folder / name).read_text() for name in ("results.tsv", "runs.jsonl")]
          for folder in sorted((ROOT / "tests" / "night").glob("?"))]
NIGHT = NIGHTS[0][0]


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """Run the notebook's code cells on a results.tsv (text, bytes or None: no file); returns their names and values."""
    plt.switch_backend("Agg")
    monkeypatch.setitem(plt.rcParams, "savefig.dpi", 30)  # coarse pictures, fast

    def execute(results, evidence=None):
        for name, content in (("results.tsv", results), ("runs.jsonl", evidence)):
            if content is not None:
                (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        names = {}
        for cell in NOTEBOOK["cells"]:
            if cell["cell_type"] == "code":
                exec(compile("".join(cell["source"]), f"analysis.ipynb, {cell['id']}", "exec"), names)
        return names

    yield execute
    plt.close("all")


def log(*rows: str) -> str:
    return "\n".join([HEADER, *rows]) + "\n"


def short(*rows: str) -> str:
    """A log of rows written as `commit score status text`, with - for an empty cell."""
    cells = [["" if cell == "-" else cell for cell in row.split(" ", 3)] for row in rows]
    return log(*(f"{commit}\t{score}\t1.0\t{status}\t{text}" for commit, score, status, text in cells))


def night() -> str:
    """A long log with steady gains, regressions, outliers and crashes."""
    draw, best, rows = random.Random(0), 0.998, [f"a 0.998{i} keep baseline" for i in (0, 4, 8)]
    for number in range(3, 126):
        kind = draw.random()
        best -= draw.choice((0.0004, 0.001, 0.003, 0.01)) if 0.07 < kind < 0.28 else 0
        worse = draw.uniform(0.1, 2) if kind > 0.95 else abs(draw.gauss(0, 0.004)) if kind > 0.28 else 0
        status, score = ("crash", "-") if kind < 0.07 else ("discard" if worse else "keep", f"{best + worse:.6f}")
        rows.append(f"b{number} {score} {status} idea {number}, told at {'some ' * (number % 5)}length")
    return short(*rows)


def line(commit: str, bpb: float, **more) -> str:
    """A line of runs.jsonl."""
    return json.dumps({"commit": commit.ljust(40, "0"), "bpb": bpb, "split": "val", "dirty": False} | more)


BASELINE, BETTER = "abc1234\t1.500000\t1.0\tkeep\tbaseline", "abc1236\t1.400000\t1.1\tkeep\tdeeper"
CRASH = "abc1237\t\t\tcrash\ttoo wide"
INPUTS = {  # name: (file, runs, of which with a score, best)
    "no file": (None, 0, 0, None), "empty file": ("", 0, 0, None),
    "header without a newline": (HEADER, 0, 0, None),
    "one row": (log(BASELINE), 1, 1, 1.5), "one discarded row": (short("a 1.6 discard wider"), 1, 1, None),
    "crashes only": (log(CRASH, CRASH), 2, 0, None), "a crash first": (log(CRASH, BASELINE, BETTER), 3, 2, 1.4),
    "a row that is cut off": (log(BASELINE, "abc1236\t1.3"), 2, 2, 1.5),
    "upper case and spaces": (log(BASELINE.upper(), " ABC1236 \t 1.4 \t 1.1 \t Keep \tdeeper"), 2, 2, 1.4),
    "metrics of zero": (short("a 1.5 keep baseline", "b 0.000000 crash x", "c 0.000000 keep typed"), 3, 1, 1.5),
    "metrics that are no numbers": (log(BASELINE, *(f"abc\t{x}\t?\tkeep\t" for x in ("nan", "inf", "-1"))), 4, 1, 1.5),
    "missing columns": ("commit\tval_bpb\tstatus\nabc1234\t1.5\tkeep\n", 1, 1, 1.5),
    "no header": (f"{BASELINE}\n{BETTER}\n", 2, 2, 1.4), "all equal": (log(*[BASELINE] * 5), 5, 5, 1.5),
    "extra columns": (f"{HEADER}\tnote\n{BASELINE}\tx\n{BETTER}\ty\n", 2, 2, 1.4),
    "tabs": (log(BASELINE, f"{BETTER}\tand\tmore"), 2, 2, 1.4), "commas": (log(BETTER).replace("\t", ","), 1, 1, 1.4),
    "other line ends": (log(BASELINE, BETTER).replace("\n", "\r\n"), 2, 2, 1.4),
    "a byte order mark": (b"\xef\xbb\xbf" + log(BASELINE, BETTER).encode(), 2, 2, 1.4),
    "odd characters": (log(BASELINE, f"{BETTER} $x_ \\frac{{ \"'<b>%s{{}} 中文 🚀 \x07\x0b\x85\u2028 µ"), 2, 2, 1.4),
    "bytes that are not UTF-8": (log(BASELINE).encode() + b"abc1236\t1.4\t1.0\tkeep\t\xff\xfe\n", 2, 2, 1.4),
    "UTF-16, as some programs save it": (log(BASELINE).encode("utf-16"), 1, 1, 1.5),
    "a long night": (night(), 126, 116, 0.8984), "a real night": (NIGHT, 19, 19, 1.123850),
}


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.filterwarnings("ignore:Glyph")  # matplotlib's font has no rocket
def test_the_notebook_survives(name, execute, tmp_path):
    content, count, scored, best = INPUTS[name]
    (tmp_path / "progress.png").write_text("of another night")
    names = execute(content)
    assert (len(names["runs"]), len(names["finished"]), names["outcomes"]["runs"].sum()) == (count, scored, count)
    assert names["runs"]["best"].dropna().iloc[-1:].tolist() == ([] if best is None else [pytest.approx(best)])
    assert (tmp_path / "progress.png").is_file() == bool(scored)


REAL = {  # what people's logs are like: (file, what columns of `runs` hold, what is said[, runs.jsonl])
    "blank commits are runs of their own": (
        short("a 1.50 keep baseline", "- 1.40 keep x", "n/a 1.60 discard y", "- 1.30 keep z"),
        {"best": [1.5, 1.4, 1.4, 1.3]}, "Best: run 4, val_bpb 1.300000 (n = 1): z"),
    "other words for a status": (
        short("a 1.5 baseline -", "b 1.4 *Kept* x", "c 1.6 reverted y", "d 1.3 accepted z", "e - OOM v"),
        {"status": ["keep", "keep", "discard", "keep", "crash"]}, "Kept: 2 of 4 changes (50%)"),
    "an unknown status": (short("a 1.5 keep baseline", "b 1.4 maybe x"), {"kept": [True, False]}, "'maybe' is not"),
    "another score": (log(BASELINE).replace("bpb", "loss"), {"kept": [False]}, "no column val_bpb; its columns are"),
    "other names": ("sha\tloss\tmem\tresult\na\t1.5\t1.0\tkeep\n", {"kept": []}, "has no column commit, val_bpb,"),
    "prose between the rows": (
        log("# day two", BASELINE, "after lunch, 2 at a time", "note\tthe machine restarted", HEADER, BETTER),
        {"val_bpb": [1.5, 1.4]}, "lines that are no runs were skipped (3): # day two; after lunch"),
    "a baseline of another machine": (
        short("a 1.50 keep baseline", "b 1.20 keep x", "c 1.45 keep new machine baseline", "d 1.40 keep y"),
        {"segment": [1, 1, 2, 2], "gain": [NAN, 0.3, NAN, 0.05]}, "3.45% of the baseline's mean 1.450000 (n = 1)"),
    "a baseline of what was kept": (
        short("a 1.50 keep baseline", "b 1.20 keep x", "b 1.21 keep baseline", "b 1.22 keep baseline, seed 43"),
        {"segment": [1, 1, 2, 2], "best": [1.5, 1.2, 1.21, 1.215], "noise": [NAN, NAN, 0.01, 0.01]}, "Runs 3 to 4,"),
    "another baseline commit right after the first": (
        short(*(f"{run} keep baseline" for run in ("a 1.9", "a 1.91", "b 1.6", "b 1.61")), "c 1.55 keep x"),
        {"segment": [1, 1, 2, 2, 2]}, "Total gain: 0.055000, 3.43% of the baseline's mean 1.605000",
        "\n".join(line(c, bpb, device="cpu") for c, bpb in zip("aabbc", (1.9, 1.91, 1.6, 1.61, 1.55)))),
    "hashes of several lengths": (
        short("abc12345 1.5 keep baseline", "`abc1234` 1.49 keep baseline", f"abc1234{'0' * 33} 1.51 keep baseline",
              "b 1.4 keep x"),
        {"segment": [1] * 4, "noise": [0.02] * 4}, "of the baseline's mean 1.500000 (n = 3)"),
    "the baseline once more": (
        short("a 1.5 keep baseline", "b 1.2 keep x", "a 1.5 keep baseline again", "c 1.1 keep baseline + wider"),
        {"segment": [1] * 4, "gain": [NAN, 0.3, NAN, 0.1]}, "(n = 2)"),
    "ideas that speak of the baseline": (
        short("a 1.50 keep baseline", "a 1.58 keep baseline, SEED=43", "a 1.52 keep baseline",
              "b 1.49 discard the baseline's rate twice, to confirm", "b 1.55 keep the baseline's rate twice, SEED=43",
              "c 1.4 keep baseline, deeper", "c 1.42 keep re-run"),
        {"segment": [1] * 7, "seed": ["42", "43", "42", "42", "43", "42", "42"], "noise": [0.03] * 7},
        "Kept: 2 of 2 changes (100%): 1 by more than the noise"),
    "gains under different seeds": (
        short("a 1.50 keep baseline", "a 1.58 keep baseline, SEED=43", "b 1.49 keep x", "b 1.53 keep x, SEED=43",
              "c **1.40** keep y"), {"gain": [NAN, NAN, 0.03, NAN, 0.09]}, "Total gain: 0.120000, 7.79% of the"),
    "names in the place of hashes": (
        short("experiment-1 1.4 keep baseline", "experiment-2 1.45 discard x", "experiment-3 1.3 keep y",
              "tried/abc1235 1.29 keep z", "HEAD 1.5 discard w", "HEAD 1.6 discard v"),
        {"key": ["experiment-1", "experiment-2", "experiment-3", "abc1235", "run 5", "run 6"],
         "best": [1.4, 1.4, 1.3, 1.29, 1.29, 1.29]}, "Best: abc1235, val_bpb 1.290000 (n = 1): z"),
    "scores that cannot be read": (
        log(BASELINE, "abc1236\t1.40 (seed 42)\t1.0\tkeep\tx", "abc1237\t-1.4\t1.0\tkeep\ty", CRASH),
        {"kept": [True, False, False, False]}, "are not counted (2): 1.40 (seed 42); -1.4"),
    "a keep that a later row takes back": (
        short("a 1.5 keep baseline", "b 0.4 keep x", "b 0.4 discard x was a leak", "c 1.4 keep y"),
        {"kept": [True, False, False, True], "gain": [NAN, NAN, 1.1, 0.1]}, "Best: c, val_bpb 1.400000 (n = 1): y"),
    "a run on a slow machine": (
        short("a 1.5 keep baseline", "b 1.6 discard slow machine", "c 1.4 keep x"), {}, "Kept: 1 of 1 changes (100%)"),
    "quotes": (short('a 1.5 keep "a ""b"" c"', 'b 1 keep "x", "y"'), {"description": ['a "b" c', '"x", "y"']}, ""),
    "no file": (None, {"kept": []}, "results.tsv is not in this folder: no runs yet."),
    "no runs.jsonl": (log(BASELINE), {}, "There is no runs.jsonl here: no row was checked against it."),
    "the mean over all runs of a commit, its gain once": (
        short("a 1.50 keep baseline", "b 1.40 discard x, to confirm", "b 1.44 keep x", "b 1.42 keep re-run"),
        {"best": [1.5, 1.5, 1.42, 1.42], "gain": [NAN, NAN, 0.08, NAN]}, "Best: b, val_bpb 1.420000 (n = 3): x\n"
        "Total gain: 0.080000, 5.33% of the baseline's mean 1.500000 (n = 1)"),
}


@pytest.mark.parametrize("name", REAL)
def test_the_notebook_is_right_on_what_people_have(name, execute, capsys):
    content, columns, said, *evidence = REAL[name]
    names = execute(content, *evidence)
    for column, values in columns.items():
        values = pytest.approx(values, nan_ok=True) if column in ("best", "gain", "noise") else values
        assert names["runs"][column].tolist() == values, column
    assert said in capsys.readouterr().out


SEEDS = [*(("a", bpb, seed, "baseline") for bpb, seed in ((1.5, 42), (1.6, 43), (1.504, 42), (1.598, 43))),
         ("b", 1.490, 42, "wider"), ("b", 1.593, 43, "wider"), ("c", 1.489, 42, "deeper")]


@pytest.mark.parametrize("how", ["runs.jsonl", "descriptions"])
def test_scores_compare_seed_by_seed_and_the_noise_is_that_of_equal_runs(how, execute, capsys):
    rows = [f"{c} {bpb} keep {text}" + f", SEED={seed}" * (how != "runs.jsonl") for c, bpb, seed, text in SEEDS]
    evidence = "\n".join(line(c, bpb, seed=seed) for c, bpb, seed, _ in SEEDS) if how == "runs.jsonl" else None
    names = execute(short(*rows), evidence)
    runs = names["runs"]
    assert [runs["noise"][1], *runs["gain"].dropna()] == pytest.approx([1.5 * 0.004, (0.012 + 0.006) / 2, 0.001])
    assert runs["best"].tolist() == pytest.approx([1.5, 1.55, 1.551, 1.5505, 1.5385, 1.5415, 1.5405])  # as known then
    assert names["kept"]["noise"].tolist()[1:] == ["beyond it", "within it"]
    assert "Kept: 2 of 2 changes (100%): 1 by more than the noise, 1 within it" in capsys.readouterr().out


def test_verdicts_that_contradict_their_score_are_listed(execute):
    rows = ["a 1.50 keep baseline", "a 1.51 keep baseline", "b 1.53 keep w", "c 1.511 keep x", "d 1.4 discard y"]
    assert execute(short(*rows, "e 1.50 discard z"))["contradictions"]["commit"].tolist() == ["b", "d"]


@pytest.mark.parametrize("rows, over", [
    (["a 1.5 keep baseline", "b 1.4 keep x", "c 9.6 discard y", "d 1.52 discard z"], {"above 1.5200 (1)"}),
    (["a 1.10 keep baseline", "b 1.21 discard x", "c 1.18 discard y", "d 1.33 discard z"], set()),
    (["a 1.0 keep baseline", "b 1.2 keep x", "c 0.99 keep y"], set()),
    (["a 1.50 keep baseline", "b 0.3 discard a leak", "c 1.4 keep x", "d 1.52 discard y"], {"below 1.4000 (1)"}),
])
def test_most_scores_lie_inside_the_picture_outliers_are_counted_and_kept_runs_are_green(rows, over, execute):
    names = execute(short(*rows, "e - crash broke"))
    labels = {text.get_text() for text in names["figure"].legends[0].get_texts()}
    assert {label for label in labels if "above" in label or "below" in label} == over and "no score (1)" in labels
    dots = {tuple(xy): mark.get_facecolor()[0] for mark in names["axes"].collections for xy in mark.get_offsets()}
    for number, run in names["finished"].query("0.5 < val_bpb < 9").iterrows():
        assert to_hex(dots[number, run["val_bpb"]]) == names["GREEN" if run["kept"] else "GREY"]


@pytest.mark.parametrize("content, count", [(night(), 8), (NIGHT, 5)])
def test_labels_overlap_neither_each_other_nor_the_axes_and_the_largest_gains_have_one(
        content, count, execute, monkeypatch):
    monkeypatch.setitem(plt.rcParams, "savefig.dpi", "figure")  # measured as they are drawn
    names = execute(content)
    axes = names["axes"]
    boxes = [Text.get_window_extent(label) for label in axes.texts]
    assert not [pair for pair in itertools.combinations(boxes, 2) if pair[0].overlaps(pair[1])]
    assert all(axes.bbox.containsx(x) and axes.bbox.containsy(y) for box in boxes for x, y in box.corners())
    assert [label.xy[0] for label in axes.texts][:count] == names["hits"].index[:count].tolist()


def test_early_drops_hide_neither_the_later_progress_nor_their_own_labels(execute):
    scores = enumerate([2.0, 1.5, 1.1, 1.08, 1.07, 1.06, 1.059, 1.058])
    above, below = execute(short(*(f"c{i} {x} keep change {i} told at length" for i, x in scores)))["figure"].axes
    assert [label.xy[0] for label in above.texts] == [2, 3] and {4, 5, 6} <= {label.xy[0] for label in below.texts}
    assert below.get_ylim()[1] < 1.2


def test_runs_jsonl_names_contract_machine_and_hours_and_what_it_or_the_rows_do_not_back_is_listed(execute, capsys):
    place = {"contract": "demo-1a2b3c4d", "device": "8 cores"}
    night = [line("a", 1.5, time=f"2026-11-2{time}:00+00:00", **place) for time in ("5T22:00", "6T05:30")]
    evidence = [line("a", 1.5000004), line("b", 1.7), line("c", 1.4, dirty=True), line("d", 1.3, dirty=None), "{half",
                line("e", 1.3, evaluation=2), line("f", 1.3, script="try2.py"), line("g", 1.3, evaluation=1), "[]",
                line("i", 1.3, script=None, dirty=None)]
    rows = ["a 1.500000 keep baseline", "b 1.6 discard x", "c 1.4 keep y", *(f"{c} 1.3 keep z" for c in "defghijj")]
    names = execute(short(*rows), "\n".join([*night, *evidence]))
    assert "scores that no row has (1): b000000 1.700000" in capsys.readouterr().out
    assert names["axes"].get_title(loc="left") == "demo-1a2b3c4d · 8 cores · 7.5 hours · 11 runs"
    assert dict(zip(names["doubts"]["commit"], names["doubts"]["problem"])) == {
        "b": "its runs scored 1.700000", "c": "train.py was not as committed",
        "d": "nobody knows whether train.py was as committed",
        "e": "picked among several evaluations of one run", "f": "the run was of try2.py", "h": "no run of this commit",
        "i": "the run was of no script", "j": "written twice"}


def test_the_readmes_command_leaves_a_page_and_a_picture_and_git_sees_neither(tmp_path):
    command = readme_command("uv run jupyter nbconvert")
    for name in ("analysis.ipynb", "pyproject.toml", ".python-version", ".gitignore"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "results.tsv").write_text(log(BASELINE, BETTER, CRASH))
    env = environment(tmp_path / "cache", IPYTHONDIR=str(tmp_path / ".venv" / "ipython"))
    assert "to progress.html" in shell(f"{command} 2>&1", tmp_path, env)
    page = (tmp_path / "progress.html").read_text()
    assert all(part in page for part in ("deeper", "data:image/png;base64")) and "://" not in page
    assert (tmp_path / "progress.png").is_file()
    assert command in page and "progress" not in shell("git init -q && git status --short", tmp_path, env)


@pytest.mark.parametrize("ledger", NIGHTS)
def test_every_row_of_a_real_night_is_backed_by_its_evidence_and_none_contradicts_its_score(ledger, execute):
    names = execute(*ledger)
    assert len(names["finished"]) >= 16 and names["doubts"].empty and names["contradictions"].empty


def test_the_picture_of_the_readme_is_of_the_night_beside_it_and_the_notebook_holds_no_output(execute):
    runs, rows = execute(NIGHT)["runs"], [row for results, _ in NIGHTS for row in results.splitlines()[1:]]
    picture = f"""](tests/night/night.png)

*A night in one of four worktrees, {len(runs)} of {len(set(rows))} runs: from {runs["mean"].iloc[0]:.3f} to """
    assert f"{picture}{runs['best'].iloc[-1]:.3f}.*" in (ROOT / "README.md").read_text()
    assert (ROOT / "tests" / "night" / "night.png").is_file()
    code = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    assert all((cell["outputs"], cell["execution_count"]) == ([], None) for cell in code)
