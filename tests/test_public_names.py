import gradprune


def test_every_public_name_is_there() -> None:
    for name in gradprune.__all__:
        assert getattr(gradprune, name) is not None, name
