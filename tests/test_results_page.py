"""docs/results.md is what benchmarks/report.py makes of the result files, to the letter."""

from benchmarks import report


def test_the_page_is_made_of_the_result_files():
    assert report.PAGE.read_text() == report.page()
    assert report.PLOT.is_file()
