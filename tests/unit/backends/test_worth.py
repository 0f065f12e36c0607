from hvdtrain.backends.worth import verdict


def test_what_takes_longer_than_it_saves_is_said_with_both_times():
    assert verdict("int8", 0.0125, 0.005).startswith(
        "compression int8 takes 12.5 ms a step here, and gradients as they are would take 5 ms"
    )


def test_what_saves_time_is_not_remarked_on():
    assert verdict("int8", 0.005, 0.0125) == ""
    assert verdict("int8", 0.005, 0.005) == ""
