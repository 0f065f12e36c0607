"""Which valid name was meant."""

from __future__ import annotations

from hvdtrain.settings.wording import did_you_mean, nearest, one_of


def test_the_nearest_name_ignores_case_and_is_none_when_nothing_is_near() -> None:
    assert nearest("adamW", ("SGD", "AdamW")) == "AdamW"
    assert nearest("zzz", ("SGD", "AdamW")) is None


def test_a_guess_and_a_list_are_words_of_a_message() -> None:
    assert did_you_mean("minst", ("digits", "mnist")) == "; did you mean 'mnist'?"
    assert did_you_mean("zzz", ("digits", "mnist")) == ""
    assert one_of(("fp32", "fp64")) == "one of fp32, fp64"
