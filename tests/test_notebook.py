"""analysis.ipynb: it survives every results.tsv that occurs, counts right, and draws a picture that can be read."""

import itertools
import json
import random
import shutil

import pytest
from conftest import ROOT
from test_docs import environment, readme_command, shell

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
    names = execute(content)
    runs = names["runs"]
    assert (len(runs), runs["val_bpb"].notna().sum()) == (count, scored)
    assert runs["best"].dropna().iloc[-1:].tolist() == ([] if best is None else [pytest.approx(best)])
    assert names["outcomes"]["runs"].sum() == count
    assert (tmp_path / "progress.png").is_file() == bool(count)


def test_a_second_baseline_begins_a_new_segment_with_a_best_and_a_noise_of_its_own(execute):
    second = ["def1234\t1.7\t1.0\tkeep\tbaseline", "def1234\t1.9\t1.0\tkeep\tbaseline, seed 43"]
    runs = execute(log(BASELINE, BETTER, *second, "def1235\t1.75\t1.0\tdiscard\tthinner"))["runs"]
    assert runs["segment"].tolist() == [1, 1, 2, 2, 2]
    assert runs["best"].tolist() == pytest.approx([1.5, 1.4, 1.8, 1.8, 1.8])
    assert runs["noise"].tolist() == pytest.approx([float("nan")] * 2 + [0.2] * 3, nan_ok=True)


def test_a_commit_counts_by_the_mean_over_its_seeds_and_its_gain_once(execute):
    confirmed = ["abc1236\t1.40\t1.0\tdiscard\tdeeper, to confirm", "abc1236\t1.44\t1.0\tkeep\tdeeper, seed 43"]
    names = execute(log(BASELINE, *confirmed, "abc1236\t1.42\t1.0\tkeep\tre-run"))
    assert names["runs"]["best"].iloc[-1] == pytest.approx(1.42)
    assert names["hits"]["gain"].tolist() == pytest.approx([0.08])


def test_outliers_are_clipped_and_counted_and_every_other_run_is_inside_the_picture(execute):
    names = execute(log(BASELINE, BETTER, WORSE.replace("1.6", "9.6"), WORSE.replace("1.600000", "1.52"), CRASH))
    labels = [text.get_text() for text in names["figure"].legends[0].get_texts()]
    assert [label for label in labels if label.startswith("above")] == ["above 1.5500 (1)"]
    assert {"kept (2)", "not kept (2)", "no score (1)", "best so far"} <= set(labels)
    low, high = names["axes"].get_ylim()
    assert low < 1.4 and 1.52 < high < 2


def test_labels_overlap_neither_each_other_nor_the_axes_at_126_runs(execute):
    from matplotlib.text import Text

    axes = execute(night())["axes"]
    boxes = [Text.get_window_extent(label) for label in axes.texts]
    assert len(boxes) >= 5
    assert not [pair for pair in itertools.combinations(boxes, 2) if pair[0].overlaps(pair[1])]
    assert all(axes.bbox.containsx(x) and axes.bbox.containsy(y) for box in boxes for x, y in box.corners())


def test_rows_that_no_line_of_runs_jsonl_backs_are_listed_with_the_reason(execute):
    def line(commit, bpb, **more):
        return json.dumps({"commit": commit.ljust(40, "0"), "bpb": bpb, "split": "val", "dirty": False} | more)

    evidence = [line("abc1234", 1.5000004), line("abc1235", 1.7), line("abc1236", 1.4, dirty=True), "{half", "[]"]
    names = execute(log(BASELINE, WORSE, BETTER, "fff1234\t1.3\t1.0\tkeep\ttyped", CRASH), "\n".join(evidence))
    problems = dict(zip(names["doubts"]["commit"], names["doubts"]["problem"]))
    assert problems == {"abc1234": "", "abc1235": "its runs scored 1.700000",
                        "abc1236": "train.py was not as committed", "fff1234": "no run of this commit"}


def test_nbconvert_executes_the_notebook_headless_with_the_readmes_command(tmp_path):
    command = readme_command("uv run jupyter nbconvert")
    for name in ("analysis.ipynb", "pyproject.toml", ".python-version"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "results.tsv").write_text(log(BASELINE, BETTER, WORSE, CRASH))
    env = environment(tmp_path / "cache", IPYTHONDIR=str(tmp_path / "ipython"))
    output = shell(command.replace("> /dev/null", ""), tmp_path, env)
    assert (tmp_path / "progress.png").read_bytes().startswith(b"\x89PNG")
    assert "deeper" in output and command.split()[-3:] == ["analysis.ipynb", ">", "/dev/null"]
    assert command in "".join("".join(cell["source"]) for cell in NOTEBOOK["cells"])


def test_the_caption_of_the_readmes_picture_counts_the_night_it_shows(execute):
    names = execute(NIGHT)
    best, first = names["runs"]["best"].iloc[-1], names["runs"]["best"].iloc[0]
    lines = (ROOT / "README.md").read_text().splitlines()
    caption = next(line for line in lines if line.startswith("*One short night"))
    assert f"{len(names['runs'])} runs" in caption and f"{first:.3f} to {best:.3f}" in caption


def test_the_notebook_in_git_holds_no_output():
    for cell in NOTEBOOK["cells"]:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
