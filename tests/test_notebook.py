"""analysis.ipynb: it survives every results.tsv that occurs, counts right, and draws a picture that can be read."""

import itertools
import json
import random
import shutil

import pytest
from conftest import ROOT
from test_docs import environment, readme_command, shell

NAN = float("nan")
HEADER = "commit\tval_bpb\tmemory_gb\tstatus\tdescription"
NOTEBOOK = json.loads((ROOT / "analysis.ipynb").read_text())
NIGHT = (ROOT / "tests" / "demo_night.tsv").read_text()  # what an agent wrote: contract demo, CPU, 60 s, 51 minutes


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """Run the notebook's code cells on a results.tsv (text, bytes or None: no file); returns their names and values."""
    monkeypatch.setenv("MPLBACKEND", "Agg")
    import matplotlib.pyplot as plt

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


def night(count: int = 126) -> str:
    """A long log with steady gains, regressions, outliers and crashes."""
    draw, best, rows = random.Random(0), 0.998, []
    for number in range(count):
        commit, kind = f"{number:07x}", draw.random()
        if number < 3:
            rows.append(f"aaaaaaa\t{best + 0.0004 * number:.6f}\t44.0\tkeep\tbaseline")
        elif kind < 0.07:
            rows.append(f"{commit}\t\t\tcrash\tout of memory with a table of 2^{number} rows")
        elif kind < 0.28:
            best -= draw.choice((0.0004, 0.001, 0.003, 0.01))
            rows.append(f"{commit}\t{best:.6f}\t44.0\tkeep\tidea {number}, told at {'some ' * (number % 5)}length")
        else:
            worse = draw.uniform(0.1, 2) if kind > 0.95 else abs(draw.gauss(0, 0.004))
            rows.append(f"{commit}\t{best + worse:.6f}\t44.0\tdiscard\tidea {number}, which did not work")
    return log(*rows)


BASELINE, WORSE = "abc1234\t1.500000\t1.0\tkeep\tbaseline", "abc1235\t1.600000\t1.0\tdiscard\twider"
BETTER, CRASH = "abc1236\t1.400000\t1.1\tkeep\tdeeper", "abc1237\t\t\tcrash\ttoo wide"
INPUTS = {  # name: (file, runs, of which with a score, best)
    "no file": (None, 0, 0, None),
    "empty file": ("", 0, 0, None),
    "header only": (log(), 0, 0, None),
    "header without a newline": (HEADER, 0, 0, None),
    "one row": (log(BASELINE), 1, 1, 1.5),
    "one discarded row": (log(WORSE), 1, 1, None),
    "crashes only": (log(CRASH, CRASH), 2, 0, None),
    "a crash first": (log(CRASH, BASELINE, BETTER), 3, 2, 1.4),
    "a row that is cut off": (log(BASELINE, "abc1236\t1.3"), 2, 2, 1.5),
    "upper case and spaces": (log(BASELINE.upper(), " ABC1236 \t 1.4 \t 1.1 \t Keep \tdeeper"), 2, 2, 1.4),
    "unknown status": (log(BASELINE, "abc1238\t1.3\t1.0\ttimeout\tslow", "abc1239\t1.3\t1.0\t\tslow"), 3, 3, 1.5),
    "metrics of zero": (log(BASELINE, "abc1237\t0.000000\t0.0\tcrash\tbroke"), 2, 1, 1.5),
    "a kept row of zero": (log(BASELINE, "abc1237\t0.000000\t0.0\tkeep\ttyped"), 2, 1, 1.5),
    "metrics that are no numbers": (log(BASELINE, *(f"abc\t{x}\t?\tkeep\t" for x in ("nan", "inf", "-1"))), 4, 1, 1.5),
    "missing columns": ("commit\tval_bpb\tstatus\nabc1234\t1.5\tkeep\n", 1, 1, 1.5),
    "no header": (f"{BASELINE}\n{BETTER}\n", 2, 2, 1.4),
    "extra columns": (f"{HEADER}\tnote\n{BASELINE}\tx\n{BETTER}\ty\n", 2, 2, 1.4),
    "tabs in the description": (log(BASELINE, f"{BETTER}\tand\tmore"), 2, 2, 1.4),
    "other line ends": (log(BASELINE, BETTER).replace("\n", "\r\n"), 2, 2, 1.4),
    "a byte order mark": (b"\xef\xbb\xbf" + log(BASELINE, BETTER).encode(), 2, 2, 1.4),
    "odd characters": (log(BASELINE, f"{BETTER} $x_ \\frac{{ \"'<b>%s{{}} 中文 🚀 \x07\x0b\x85\u2028 µ"), 2, 2, 1.4),
    "bytes that are not UTF-8": (log(BASELINE).encode() + b"abc1236\t1.4\t1.0\tkeep\t\xff\xfe\n", 2, 2, 1.4),
    "all scores equal": (log(*[BASELINE] * 5), 5, 5, 1.5),
    "a long night": (night(), 126, 117, 0.9294),
    "a real night": (NIGHT, 30, 29, (1.443903 + 1.444860) / 2),
}


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.filterwarnings("ignore:Glyph")  # matplotlib's font has no rocket
def test_the_notebook_survives(name, execute, tmp_path):
    content, count, scored, best = INPUTS[name]
    (tmp_path / "progress.png").write_text("of another night")
    names = execute(content)
    runs = names["runs"]
    assert (len(runs), runs["val_bpb"].notna().sum()) == (count, scored)
    assert runs["best"].dropna().iloc[-1:].tolist() == ([] if best is None else [pytest.approx(best)])
    assert names["outcomes"]["runs"].sum() == count
    assert (tmp_path / "progress.png").is_file() == bool(scored)


def short(*rows: str) -> str:
    """A log of rows written as `commit score status text`, with - for an empty cell."""
    cells = [["" if cell == "-" else cell for cell in row.split(" ", 3)] for row in rows]
    return log(*(f"{commit}\t{score}\t1.0\t{status}\t{text}" for commit, score, status, text in cells))


REAL = {  # kinds of results.tsv that people have: (file, what `runs` holds in some column, what is said)
    "blank commits are runs of their own": (
        short("a 1.50 keep baseline", "- 1.40 keep x", "n/a 1.60 discard y", "- 1.30 keep z"),
        {"best": [1.5, 1.4, 1.4, 1.3]}, "Best: run 4, val_bpb 1.300000 (n = 1): z"),
    "synonyms of the statuses": (
        short("a 1.5 baseline -", "b 1.4 Kept x", "c 1.6 reverted y", "d 1.3 accepted z", "e - OOM w",
              "f 1.6 **rejected** v"),
        {"status": ["keep", "keep", "discard", "keep", "crash", "discard"], "best": [1.5, 1.4, 1.4, 1.3, 1.3, 1.3]},
        "Kept: 2 of 5 changes (40%)"),
    "statuses that nobody knows": (short("a 1.5 keep baseline", "b 1.4 maybe x"), {"kept": [True, False]},
                                   "The status 'maybe' is not known (runs: 1): not counted as kept."),
    "another name for the score": (log("a\t1.5\t1.0\tkeep\tx").replace("bpb", "loss"), {"kept": [False]},
                                   "results.tsv has no column val_bpb; its columns are commit, val_loss,"),
    "other names for everything": ("sha\tloss\tmem\tresult\nabc1234\t1.5\t1.0\tkeep\n", {"kept": []},
                                   "has no column commit, val_bpb, memory_gb, status, description"),
    "prose between the rows": (
        log("# day two", BASELINE, "after lunch, 2 at a time", "note\tthe machine restarted", HEADER, BETTER),
        {"val_bpb": [1.5, 1.4]}, "lines that are no runs were skipped (3): # day two; after lunch"),
    "a baseline of another machine": (
        short("a 1.50 keep baseline", "b 1.20 keep x", "c 1.45 keep new machine baseline", "d 1.40 keep y"),
        {"segment": [1, 1, 2, 2], "gain": [NAN, 0.3, NAN, 0.05]}, "3.45% of the baseline's mean 1.450000 (n = 1)"),
    "the baseline once more": (
        short("a 1.50 keep baseline", "b 1.20 keep x", "a 1.500 keep baseline again", "c 1.1 keep beats the baseline",
              "d 1.0 keep baseline + wider"), {"segment": [1] * 5, "gain": [NAN, 0.3, NAN, 0.1, 0.1]}, "(n = 2)"),
    "quotes as in CSV": (short('a 1.5 keep "a ""quoted"" text"', 'b 1.4 keep "x" and "y"'),
                         {"description": ['a "quoted" text', '"x" and "y"']}, ""),
    "commas": (short("a 1.5 keep baseline", "b 1.4 keep x").replace("\t", ","), {"best": [1.5, 1.4]}, ""),
    "no file": (None, {}, "results.tsv is not in this folder: no runs yet."),
    "no runs.jsonl": (log(BASELINE, BETTER), {}, "There is no runs.jsonl here: no row was checked against it."),
}


@pytest.mark.parametrize("name", REAL)
def test_the_notebook_is_right_on_what_people_have(name, execute, capsys):
    content, columns, said = REAL[name]
    names = execute(content)
    for column, values in columns.items():
        values = values if isinstance((values or [""])[0], str) else pytest.approx(values, nan_ok=True)
        assert names["runs"][column].tolist() == values, column
    assert said in capsys.readouterr().out
    assert names["doubts"]["problem"].eq("").all()


def test_a_second_baseline_begins_a_new_segment_with_a_best_and_a_noise_of_its_own(execute):
    second = ["def1234\t1.7\t1.0\tkeep\tbaseline", "def1234\t1.9\t1.0\tkeep\tbaseline, seed 43"]
    runs = execute(log(BASELINE, BETTER, *second, "def1235\t1.75\t1.0\tdiscard\tthinner"))["runs"]
    assert runs["segment"].tolist() == [1, 1, 2, 2, 2]
    assert runs["best"].tolist() == pytest.approx([1.5, 1.4, 1.7, 1.8, 1.8])
    assert runs["noise"].tolist() == pytest.approx([NAN] * 2 + [0.2] * 3, nan_ok=True)


def line(commit: str, bpb: float, **more) -> str:
    """A line of runs.jsonl."""
    return json.dumps({"commit": commit.ljust(40, "0"), "bpb": bpb, "split": "val", "dirty": False} | more)


SEEDS = [("a", 1.500, 42, "baseline"), ("a", 1.600, 43, "baseline"), ("a", 1.504, 42, "baseline"),
         ("a", 1.598, 43, "baseline"), ("b", 1.490, 42, "wider"), ("b", 1.593, 43, "wider"), ("c", 1.489, 42, "deeper")]


@pytest.mark.parametrize("how", ["runs.jsonl", "descriptions"])
def test_scores_compare_seed_by_seed_and_the_noise_is_that_of_equal_runs(how, execute, capsys):
    rows = [f"{c} {bpb} keep {text}" + f", SEED={seed}" * (how != "runs.jsonl") for c, bpb, seed, text in SEEDS]
    evidence = "\n".join(line(c, bpb, seed=seed) for c, bpb, seed, _ in SEEDS) if how == "runs.jsonl" else None
    names = execute(short(*rows), evidence)
    runs = names["runs"]
    assert runs["noise"].iloc[0] == pytest.approx(1.5 * 0.004)
    assert runs["gain"].dropna().tolist() == pytest.approx([(0.012 + 0.006) / 2, 0.001])
    assert runs["best"].tolist() == pytest.approx([1.5, 1.55, 1.551, 1.5505, 1.5385, 1.5415, 1.5405])  # as known then
    assert names["kept"]["noise"].tolist()[1:] == ["beyond it", "within it"]
    assert "Kept: 2 of 2 changes (100%): 1 by more than the noise, 1 within it" in capsys.readouterr().out


def test_a_commit_counts_by_the_mean_over_its_seeds_and_its_gain_once(execute, capsys):
    confirmed = ["abc1236\t1.40\t1.0\tdiscard\tdeeper, to confirm", "abc1236\t1.44\t1.0\tkeep\tdeeper, again"]
    names = execute(log(BASELINE, *confirmed, "abc1236\t1.42\t1.0\tkeep\tre-run"))
    assert names["runs"]["best"].tolist() == pytest.approx([1.5, 1.5, 1.42, 1.42])
    assert names["hits"]["gain"].tolist() == pytest.approx([0.08])
    said = capsys.readouterr().out
    assert "Best: abc1236, val_bpb 1.420000 (n = 3): deeper, again" in said
    assert "Total gain: 0.080000, 5.33% of the baseline's mean 1.500000 (n = 1)" in said


def test_verdicts_that_contradict_their_score_are_listed(execute):
    rows = ["a 1.50 keep baseline", "a 1.51 keep baseline", "b 1.53 keep lost", "c 1.511 keep simpler",
            "d 1.40 discard won", "e 1.50 discard as good"]
    assert execute(short(*rows))["contradictions"]["commit"].tolist() == ["b", "d"]


def test_outliers_are_clipped_and_counted_and_every_other_run_is_inside_the_picture(execute):
    names = execute(log(BASELINE, BETTER, WORSE.replace("1.6", "9.6"), WORSE.replace("1.600000", "1.52"), CRASH))
    labels = [text.get_text() for text in names["figure"].legends[0].get_texts()]
    assert [label for label in labels if label.startswith("above")] == ["above 1.5200 (1)"]
    assert {"kept (2)", "not kept (2)", "no score (1)", "best so far"} <= set(labels)
    low, high = names["axes"].get_ylim()
    assert low < 1.4 and 1.52 < high < 2


@pytest.mark.parametrize("rows", [
    ["a 1.10 keep baseline", "b 1.21 discard x", "c 1.18 discard y", "d 1.33 discard z"],
    ["a 1.0 keep baseline", "b 1.2 keep x", "c 0.99 keep y"],
])
def test_most_scores_lie_inside_the_limit_and_kept_ones_are_green(rows, execute):
    names = execute(short(*rows))
    dots = {tuple(xy): mark.get_facecolor()[0] for mark in names["axes"].collections for xy in mark.get_offsets()}
    from matplotlib.colors import to_rgba

    for number, run in names["runs"].iterrows():
        color = names["GREEN"] if run["kept"] else names["GREY"]
        assert tuple(dots[number, run["val_bpb"]]) == to_rgba(color)


@pytest.mark.parametrize("content, count", [(night(), 8), (NIGHT, 5)])
def test_labels_overlap_neither_each_other_nor_the_axes_and_the_largest_gains_have_one(content, count, execute):
    from matplotlib.text import Text

    names = execute(content)
    axes = names["axes"]
    boxes = [Text.get_window_extent(label) for label in axes.texts]
    assert not [pair for pair in itertools.combinations(boxes, 2) if pair[0].overlaps(pair[1])]
    assert all(axes.bbox.containsx(x) and axes.bbox.containsy(y) for box in boxes for x, y in box.corners())
    assert [label.xy[0] for label in axes.texts][:count] == names["hits"].index[:count].tolist()


def test_early_drops_hide_neither_the_later_progress_nor_their_own_labels(execute):
    scores = [2.0, 1.5, 1.1, 1.08, 1.07, 1.06, 1.059, 1.058]
    figure = execute(short(*(f"c{i} {x} keep change {i} told at length" for i, x in enumerate(scores))))["figure"]
    above, below = figure.axes
    assert [label.xy[0] for label in above.texts] == [2, 3] and {4, 5, 6} <= {label.xy[0] for label in below.texts}
    assert below.get_ylim()[1] < 1.2


def test_the_picture_names_contract_machine_and_hours(execute):
    times = {"abc1234": "2026-11-25T22:00:00+00:00", "abc1236": "2026-11-26T05:30:00+00:00"}
    lines = [line(c, 1.5, contract="demo-1a2b3c4d", device="8 cores", time=time) for c, time in times.items()]
    axes = execute(log(BASELINE, BETTER), "\n".join(lines))["axes"]
    assert axes.get_title(loc="left") == "demo-1a2b3c4d · 8 cores · 7.5 hours · 2 runs"


def test_rows_that_no_line_of_runs_jsonl_backs_are_listed_with_the_reason(execute):
    bpb = 1.3
    evidence = [line("a", 1.5000004), line("b", 1.7), line("c", 1.4, dirty=True), line("d", bpb, dirty=None), "{half",
                line("e", bpb, evaluation=2), line("f", bpb, script="try2.py"), line("g", bpb, evaluation=1), "[]"]
    rows = ["a 1.500000 keep baseline", "b 1.6 discard x", "c 1.4 keep y", *(f"{c} 1.3 keep z" for c in "defgh")]
    names = execute(short(*rows), "\n".join(evidence))
    assert dict(zip(names["doubts"]["commit"], names["doubts"]["problem"])) == {
        "a": "", "b": "its runs scored 1.700000", "c": "train.py was not as committed", "d": "", "g": "",
        "e": "picked among several evaluations of one run", "f": "the run was of try2.py", "h": "no run of this commit"}


@pytest.mark.parametrize("content", [log(BASELINE, BETTER, WORSE, CRASH), None], ids=["a night", "no results.tsv"])
def test_the_readmes_command_leaves_a_page_and_a_picture_and_git_sees_neither(content, tmp_path):
    command = readme_command("uv run jupyter nbconvert")
    for name in ("analysis.ipynb", "pyproject.toml", ".python-version", ".gitignore"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("progress.png", "progress.html"):
        (tmp_path / name).write_text("of another night")
    if content:
        (tmp_path / "results.tsv").write_text(content)
    env = environment(tmp_path / "cache", IPYTHONDIR=str(tmp_path / ".venv" / "ipython"))
    assert "to progress.html" in shell(f"{command} 2>&1", tmp_path, env)
    page = (tmp_path / "progress.html").read_text()
    assert ("deeper" if content else "results.tsv is not in this folder") in page and "://" not in page
    assert (tmp_path / "progress.png").is_file() == ("data:image/png;base64" in page) == bool(content)
    status = shell("git init -q && git status --short", tmp_path, env)
    assert "progress" not in status and command in page


def test_the_caption_of_the_readmes_picture_counts_the_night_it_shows(execute):
    runs = execute(NIGHT)["runs"]
    lines = (ROOT / "README.md").read_text().splitlines()
    caption = next(line for line in lines if line.startswith("*One short night"))
    assert f"{len(runs)} runs" in caption and f"{runs['mean'].iloc[0]:.3f} to {runs['best'].iloc[-1]:.3f}" in caption
    assert any("](tests/demo_night.png)" in line for line in lines) and (ROOT / "tests" / "demo_night.png").is_file()


def test_the_notebook_in_git_holds_no_output():
    for cell in NOTEBOOK["cells"]:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
