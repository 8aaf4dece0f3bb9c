"""Progress in a file: whole lines, now and then, without carriage returns."""

import re

from deltallava_jax import progress


def test_a_line_reports_what_is_done_and_the_time_left(monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY", 0)
    with progress.progress_bar(what="training", unit="steps", total=3000, start=1000, keep=True) as bar:
        bar.set_postfix_str("loss 2.5")
        bar.update(1000)
        bar.write("resuming")
        bar.update(1000)
    first, written, last = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"training: 2,000 of 3,000 steps, loss 2\.5, 0:0\d:\d\d left", first)
    assert written == "resuming" and last == "training: 3,000 of 3,000 steps, loss 2.5"


def test_short_work_prints_nothing_unless_its_end_is_kept(capsys):
    assert list(progress.progress_bar(range(3), "reading", unit="arrays")) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    with progress.progress_bar(what="writing", unit="B", total=12_000_000, keep=True) as bar:
        bar.update(12_000_000)
    assert capsys.readouterr().err == "writing: 12 of 12 MB\n"
    with progress.progress_bar(what="counting", unit="rows", shown=False, keep=True) as bar:
        bar.update()
    assert capsys.readouterr().err == ""
