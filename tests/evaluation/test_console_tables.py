"""Tables on the console."""

from dspark_megatron.evaluation.report import text_table


def test_text_is_on_the_left_and_numbers_are_on_the_right():
    rows = [{"name": "x", "n": 1234}, {"name": "long"}]
    text = text_table(rows, {"name": "", "n": ",d"})
    assert text.splitlines() == ["name      n", "x     1,234", "long      -"]
