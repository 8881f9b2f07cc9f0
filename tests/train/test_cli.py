"""The line that a user reads instead of a traceback."""

import pytest

from train import cli


def test_control_codes_of_a_foreign_name_do_not_reach_the_terminal(capsys):
    def main():
        raise ValueError("there is no `\x1b]0;title\x07\x1b[31mname\n\u202e`; Größe ≥ 1")

    with pytest.raises(SystemExit) as caught:
        cli.run(main)
    assert caught.value.code == cli.EXIT_BAD_INPUT
    expected = "error: there is no `\\x1b]0;title\\x07\\x1b[31mname \\u202e`; Größe ≥ 1\n"
    assert capsys.readouterr().err == expected
