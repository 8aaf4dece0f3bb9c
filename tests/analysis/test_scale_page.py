"""docs/scale.md is what benchmarks/scale.py makes of the result files, to the letter."""

from benchmarks import scale


def test_the_page_is_made_of_the_result_files():
    assert scale.PAGE.read_text() == scale.page()
