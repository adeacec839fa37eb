import gradprune


def test_every_public_name_exists() -> None:
    for name in gradprune.__all__:
        assert getattr(gradprune, name) is not None, name
