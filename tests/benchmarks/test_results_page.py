"""docs/results.md and README's table are what benchmarks/reports/results.py makes of the result files."""

import re

from benchmarks.reports import efficiency, results


def test_the_readme_shows_the_same_numbers():
    assert results.summary(results.easy_vqa_runs()) in (results.ROOT / "README.md").read_text()


def test_the_page_is_made_of_the_result_files():
    assert results.PAGE.read_text() == results.page()
    shown = re.findall(r"\]\((\w+\.png)\)", results.page())
    assert {results.PLOT.name, *efficiency.PLOTS} == set(shown)
    assert all((results.PAGE.parent / name).is_file() for name in shown)
