import pytest

from clae_dist.wording import count_of


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 processes"), (1, "1 process"), (2000, "2,000 processes"), (0.25, "0.25 processes"), (1.0, "1 process")],
)
def test_a_number_with_its_noun(number: float, text: str) -> None:
    assert count_of(number, "process", "processes") == text
