"""docs/results.md is what benchmarks/report.py makes of the result files, to the letter."""

import re

from benchmarks import report, report_efficiency


def test_the_page_is_made_of_the_result_files():
    assert report.PAGE.read_text() == report.page()
    shown = re.findall(r"\]\((\w+\.png)\)", report.page())
    assert {report.PLOT.name, *report_efficiency.PLOTS} == set(shown)
    assert all((report.PAGE.parent / name).is_file() for name in shown)
