"""The keep rule of program.md, `prepare.verdict`: made-up nights with known answers."""

import json
from pathlib import Path

import pytest

import prepare


class Night:
    """results.tsv and runs.jsonl in the working directory, and a git that knows HEAD and the lines it changed."""

    def __init__(self, monkeypatch):
        self.head, self.lines = "basebas", "0\t0\ttrain.py"
        monkeypatch.setattr(prepare, "HERE", Path())
        monkeypatch.setattr(prepare, "_git", lambda *arguments: self.head if "rev-parse" in arguments else self.lines)
        Path("results.tsv").write_text("commit\tval_bpb\tmemory_gb\tstatus\tdescription\n")
        Path("runs.jsonl").write_text("")

    def run(self, commit: str, /, seed: int, bpb: float, memory: float = 1000.0, tokens: int = 10_000, **more) -> None:
        self.head, line = commit, {"commit": commit * 6, "dirty": False, "split": "val", "contract": "demo-1",
                                   "seed": seed, "bpb": bpb, "peak_memory_mb": memory, "tokens": tokens} | more
        with open("runs.jsonl", "a") as evidence:
            evidence.write(json.dumps(line) + "\n")

    def row(self, status: str, text: str = "an idea") -> None:
        with open("results.tsv", "a") as ledger:
            ledger.write(f"{self.head}\t1.5\t1.0\t{status}\t{text}\n")

    def baseline(self, commit: str, *scores: float, **more) -> None:
        for seed, bpb in zip((42, 43, 42, 43), scores):
            self.run(commit, seed, bpb, **more)
            self.row("keep", "baseline")

    def verdict(self, *scores: float, **more) -> str:
        """The last line, of HEAD or of a new commit that scored this under SEED=42 and 43."""
        for seed, bpb in zip((42, 43), scores):
            self.run("newnewn", seed, bpb, **more)
        return prepare.verdict().rpartition("verdict: ")[2]


@pytest.fixture
def night(monkeypatch):
    """Scores of the baseline: 1.51 and 1.58 in the mean; noise 1.5 x 0.02 = 0.03, a third of it 0.01."""
    night = Night(monkeypatch)
    night.baseline("basebas", 1.50, 1.58, 1.52, 1.58)
    return night


@pytest.mark.parametrize("lines, memory, scores, word", [
    (0, 1, (1.479,), "keep"), (500, 1, (1.479,), "keep"),  # better by more than the noise, under one seed
    (0, 1, (1.481,), "run SEED=43"), (0, 1, (1.51,), "discard"), (-9, 1, (1.52,), "discard"),
    (0, 1, (1.511, 1.40), "discard"),  # SEED=42 comes first: nobody tries seeds until one is lucky
    (0, 1, (1.509, 1.560), "keep"), (0, 1, (1.509, 1.562), "discard"),  # in the mean of both by 0.0105 and 0.0095
    (-10, 1, (1.539,), "run SEED=43"), (-10, 1, (1.541,), "discard"),  # less code may cost a little...
    (-10, 1, (1.519, 1.588), "keep"), (-10, 1, (1.519, 1.592), "discard"),  # ...in the mean of both
    (19, 1, (1.485, 1.552), "keep"), (20, 1, (1.485, 1.552), "discard"), (20, 1, (1.485, 1.542), "keep"),  # or much
    (0, 2, (1.479,), "keep"), (0, 2.1, (1.22,), "discard"), (0, 2.1, (1.20,), "keep"),  # ten times the noise
])
def test_the_rule(night, lines, memory, scores, word):
    night.lines = f"{30 + max(lines, 0)}\t{30 - min(lines, 0)}\ttrain.py"
    assert night.verdict(*scores, memory=1000 * memory) == word


def test_a_small_gain_over_a_commit_of_one_seed_asks_for_its_other_seed_first(night):
    night.run("bestbes", 42, 1.40)
    night.row("keep")
    assert night.verdict() == "this is the best commit; go on with the next idea"
    assert night.verdict(1.39) == "run BEST under SEED=43 (bestbes; after it, this one)"
    night.run("bestbes", 43, 1.47)
    night.row("keep", "re-run")
    assert night.verdict(1.39) == "run SEED=43"
    assert night.verdict(1.39, 1.45) == "keep"


def test_what_was_scored_before_the_baseline_is_neither_judged_nor_best(monkeypatch):
    night = Night(monkeypatch)
    night.run("oldbest", 42, 1.2)
    night.baseline("basebas", 1.50, 1.58, 1.52, 1.58)
    night.head = "oldbest"
    night.row("keep")
    assert night.verdict() == "run SEED=42 (oldbest has no run since the baseline, basebas, was run)"
    assert night.verdict(1.40) == "keep"
    assert "best basebas" in prepare.verdict()


def test_the_figures_and_equal_runs_that_raise_the_noise(night):
    assert "note: " not in prepare.verdict()
    night.run("basebas", 42, 1.48, tokens=9_900)  # 1.52 before: noise is now 0.06, the mean 1.50
    night.verdict(1.485, 1.55, memory=1500, tokens=9_000)
    assert prepare.verdict() == """best basebas: SEED=42 [1.5, 1.52, 1.48], SEED=43 [1.58, 1.58]
HEAD newnewn: SEED=42 [1.485], SEED=43 [1.55]
noise: 0.060000, 1.5 x the largest difference between equal runs (n = 2)
HEAD - best: -0.015000, -0.030000, mean -0.022500
limits: below -0.060000 keep, below +0.000000 run the other seed, then keep a mean below -0.020000
lines of code: +0 -0; memory: 1500 MB, free up to 2000 MB
tokens trained: -9.7%, -10.0%, equal runs differ by 1.0%: SLOWER
note: if the change does not explain that speed, it is a `slow machine`
verdict: keep"""


def test_commits_that_are_not_behind_head_are_neither_baseline_nor_best(night, monkeypatch):
    """results.tsv is not in git: another branch's rows, or those of a commit that was reworded, stay in it."""
    git, others = prepare._git, {"otherba", "otherbe"}
    monkeypatch.setattr(prepare, "_git", lambda *asked: git(*asked) if others.isdisjoint(asked) else None)
    night.baseline("otherba", 1.30, 1.38, 1.32, 1.38)
    night.run("otherbe", 42, 1.20)
    night.row("keep")
    assert night.verdict(1.40) == "keep" and "best basebas" in prepare.verdict()
    assert "note: otherbe is kept last in results.tsv" in prepare.verdict()


def test_memory_beyond_twice_the_baselines_is_paid_for_once(night):
    night.run("largela", 42, 1.10, memory=3000)
    night.row("keep")
    assert night.verdict(1.05, memory=3010) == "keep"
    night.row("keep")
    night.run("largerl", 42, 1.00, memory=3300)
    assert prepare.verdict().endswith("discard")


def test_a_keep_that_a_later_row_takes_back_is_not_best(night):
    night.run("leakyle", 42, 0.4)
    night.row("keep", "too good")
    assert "best leakyle" in prepare.verdict()
    night.row("discard", "was a leak")
    assert night.verdict(1.40) == "keep" and "best basebas" in prepare.verdict()


def test_a_rerun_that_breaks_off_and_an_old_commit_measured_again_leave_the_best_what_it_is(night):
    night.run("bestbes", 42, 1.40)
    night.row("keep")
    night.row("crash", "re-run, SEED=43")
    night.head = "basebas"
    night.row("keep", "baseline again")
    assert night.verdict(1.45) == "discard" and "best bestbes" in prepare.verdict()


def test_a_second_session_on_the_same_machine_needs_a_baseline_and_no_note(night):
    night.run("morning", 42, 1.5)
    night.row("keep", "baseline")
    assert prepare.verdict() == "verdict: baseline: 3 more runs of morning: SEED=42, SEED=43, SEED=43"


def test_an_attempt_on_another_machine_is_told_from_a_baseline(night):
    assert night.verdict(1.40, device="other").startswith("baseline: 3 more runs of newnewn")
    assert prepare.verdict().startswith("note: the baselines of results.tsv ran on another machine")
    assert night.verdict(1.40) == "keep"  # the newest run says which machine


@pytest.mark.parametrize("drew, note", [
    ({"tokens": 0}, "no batch of the split train"), ({"held_out_tokens": 64}, "batches of the split val or test")])
def test_a_run_that_drew_no_training_text_or_a_held_out_split_is_not_kept(night, drew, note):
    assert night.verdict(1.2, **drew) == "discard" and f"note: newnewn drew {note}" in prepare.verdict()
    night.run("another", 42, 1.3)
    night.run("another", 43, 1.3, **drew)
    assert night.verdict() == ("discard" if "held_out_tokens" in drew else "keep")


def test_baselines_that_the_machine_drove_apart_are_to_be_measured_again(night):
    night.run("basebas", 43, 1.58, tokens=8_900)
    assert "note: equal runs differ much: stop what else runs here" in prepare.verdict()
    assert night.verdict(1.40, tokens=10_600) == "keep"  # as equal runs differ: no FASTER


def test_a_gain_of_a_run_that_trained_more_has_to_hold_under_the_other_seed(night):
    """The machine may have been faster: what is clear under one seed is not kept on that alone."""
    assert night.verdict(1.40, tokens=10_600) == "run SEED=43"
    assert "tokens trained: +6.0%, equal runs differ by 0.0%: FASTER" in prepare.verdict()
    assert night.verdict(1.40, 1.69, tokens=10_600) == "discard"
    night.run("halffas", 42, 1.40, tokens=10_600)
    night.run("halffas", 43, 1.69)
    assert night.verdict() == "discard" and "+6.0%, +0.0%, equal runs differ by 0.0%: FASTER" in prepare.verdict()
    night.run("halfslo", 42, 1.40, tokens=9_400)
    night.run("halfslo", 43, 1.40)
    assert "-6.0%, +0.0%, equal runs differ by 0.0%: SLOWER" in prepare.verdict()
    for seed, bpb in (42, 1.20), (43, 1.50):  # too much memory: by ten times the noise, in the mean as well
        night.run("another", seed, bpb, tokens=10_600, memory=2100)
    assert night.verdict() == "discard"


def test_a_run_that_trained_for_longer_than_the_baseline_is_discarded_and_says_why(night):
    """Whatever it scored: code off the clock, say. The last step may end a little late."""
    night.baseline("morning", 1.50, 1.58, 1.52, 1.58, training_seconds=60.2)
    assert night.verdict(1.40, training_seconds=63.2) == "keep" and "trained for" not in prepare.verdict()
    night.row("keep")
    night.run("another", 42, 1.30, training_seconds=63.3)
    assert night.verdict() == "discard"
    assert "note: another trained for 63.3 s, the baseline for 60.2 s\n" in prepare.verdict()


def test_a_kept_row_without_a_run_is_named_since_the_last_step_would_restore_it(night):
    night.head = "1.2e+06"
    night.row("keep")
    assert night.verdict(1.40) == "keep"
    assert "note: 1.2e+06 is kept last in results.tsv, but has no such run under SEED=42" in prepare.verdict()


def test_a_row_whose_status_is_none_of_the_three_is_named(night):
    night.head = "another"
    night.row("crash")
    night.row("reverted")
    assert night.verdict(1.40) == "keep"
    assert "note: the status of another in results.tsv is not keep, discard or crash\n" in prepare.verdict()


def test_a_ledger_in_which_nothing_is_called_baseline_is_said(night):
    Path("results.tsv").write_text(Path("results.tsv").read_text().replace("\tbaseline", "\tunchanged"))
    assert night.verdict(1.40).startswith("baseline: 3 more runs of newnewn")
    assert prepare.verdict().startswith("note: no row of results.tsv has the text `baseline`\n")


def test_missing_evidence_is_named(monkeypatch):
    night = Night(monkeypatch)
    night.run("basebas", 42, 1.5)
    assert night.verdict() == "baseline: 3 more runs of basebas: SEED=42, SEED=43, SEED=43"
    night.baseline("basebas", 1.5, 1.6)
    assert night.verdict() == night.verdict(1.0) == "baseline: 1 more run of basebas: SEED=43"
    Path("runs.jsonl").unlink(), Path("results.tsv").unlink()
    assert night.verdict() == "run SEED=42 (runs.jsonl has no such run of newnewn as committed, on the split val)"
    night.run("newnewn", 1337, 1.4)
    assert night.verdict().endswith("on the split val; it has seeds [1337]: does train.py set one?)")


def test_other_contracts_splits_edited_files_second_exams_broken_lines_and_earlier_sessions_do_not_count(night):
    for more in ({"dirty": True}, {"split": "test"}, {"evaluation": 2}, {"contract": "demo-2"}, {"commit": None},
                 {"device": "H200"}, {"script": "sweep.py", "dirty": None}, {"dirty": None},
                 {"script": None, "dirty": None}, {"shards": 3}, {"torch": "9"}, {"prepare_sha256": "edited"}):
        night.run("basebas", 42, 9.0, **more)
        night.run("newnewn", 42, 0.1, **more)
    with open("runs.jsonl", "a") as evidence:
        evidence.write('\n3\n{}\n{"commit": "newn\n')
        evidence.write('{"commit": "newnewn", "dirty": false, "split": "val", "bpb": 0.1}\n')
    with open("results.tsv", "a") as ledger:
        ledger.write("\ncrashed\t\t\tcrash\twide\nold\t0.000000\t0.0\tcrash\n\nunknown\t0.1\t1.0\tkeep\tno line end")
    assert night.verdict(1.481) == "run SEED=43" and "noise: 0.030000" in prepare.verdict()
    assert "note: newnewn evaluates more than once; the first score of a run counts\n" in prepare.verdict()
    night.run("bestbes", 42, 1.0)
    night.row("keep")
    night.baseline("morning", 2.0, 2.1, 2.001, 2.1, memory=3000)
    night.run("another", 42, 1.99, memory=6000)
    assert night.verdict() == "keep" and "noise: 0.001500" in prepare.verdict()


@pytest.mark.parametrize("text", ["baseline 2", "Baseline (unchanged)", "new baseline", "baseline run 1, SEED=43",
                                  "Initial baseline", "baseline on an H200", "baseline (n=1)"])
def test_a_baseline_may_be_said_in_other_words_but_not_an_idea_that_follows_it(night, text):
    ledger = Path("results.tsv")
    ledger.write_text(ledger.read_text().replace("\tbaseline", f"\t{text}"))
    night.run("another", 42, 1.40)
    night.row("keep", "baseline, deeper")
    assert "note: " not in prepare.verdict()
    assert night.verdict(1.39) == "run BEST under SEED=43 (another; after it, this one)"


@pytest.mark.parametrize("row", ["bestbes2222\t1.4\t1.0\tKeep", '"bestbes"\t"1.4"\t"1.0"\t"kept"\t"an idea"',
                                 "bestbes\t1.4\t1.0\t**keep** (best)\tan idea"])
def test_rows_count_however_a_hand_wrote_hash_status_and_baseline(night, row):
    rows = Path("results.tsv").read_text().replace("baseline", "Baseline (SEED=42)").replace("basebas", "BASEBAS1")
    night.run("bestbes", 42, 1.40)
    Path("results.tsv").write_text(f"\ufeff{rows}{row}\n")
    assert night.verdict(1.45) == "discard" and "noise: 0.030000" in prepare.verdict()
    for odd in rows.replace("\t", ",").encode(), rows.encode("utf-16"):
        Path("results.tsv").write_bytes(odd)
        with pytest.raises(prepare.Failure, match="tabs between them"):
            prepare.verdict()


def test_what_git_does_not_know_is_said_and_tokens_nobody_counted_are_no_speed(night, monkeypatch):
    night.baseline("morning", 1.5, 1.6, 1.5, 1.6, tokens=0)
    assert night.verdict(1.4, tokens=0) == "keep" and "equal runs differ by 0.0%\n" in prepare.verdict()
    for unknown, words in (("diff", "git does not know morning"), ("rev-parse", "git knows none here")):
        monkeypatch.setattr(prepare, "_git", lambda *asked, u=unknown: None if u in asked else "newnewn")
        with pytest.raises(prepare.Failure, match=words):
            prepare.verdict()
