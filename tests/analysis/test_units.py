import pytest

from deltallava_jax.analysis.units import operations, seconds, size


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (size(0), "0 bytes"),
        (size(1000), "1,000 bytes"),
        (size(1.5 * 2**20), "1.50 MiB"),
        (size(79.2 * 2**30), "79.2 GiB"),
        (size(2**60), "1,024 PiB"),
        (operations(0), "0 FLOP"),
        (operations(123_456_789), "123 MFLOP"),
        (operations(9.99e8), "999 MFLOP"),
        (operations(7.43e12), "7.43 TFLOP"),
        (seconds(0), "0 ns"),
        (seconds(3.5e-7), "350 ns"),
        (seconds(0.00012), "120 µs"),
        (seconds(0.25), "250 ms"),
        (seconds(1.0), "1 s"),
        (seconds(1234.5), "1,234 s"),
    ],
)
def test_the_unit_fits_the_quantity(text, expected):
    assert text == expected
