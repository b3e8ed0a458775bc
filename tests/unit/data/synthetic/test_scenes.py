"""Scenes are the same for the same seed, split by content, and told in dense captions."""

import pytest

from rsa_megatron.data.synthetic import scenes


def some(count=300, validation=False, seed=0):
    return [scenes.make_scene(seed, index, validation=validation) for index in range(count)]


def test_a_seed_gives_the_same_scene_picture_and_texts():
    first, second = (scenes.make_scene(7, 3, validation=False) for _ in range(2))
    assert first == second
    assert scenes.render(first, 64, "a").tobytes() == scenes.render(second, 64, "a").tobytes()
    for view in (scenes.write_caption, scenes.write_questions, scenes.write_text):
        assert view(first, "a") == view(second, "a")
    assert some(20, seed=1) != some(20, seed=2)


def test_no_combination_of_validation_occurs_in_training():
    def combination(scene):
        return scene.theme.name, tuple(sorted((thing.colour, thing.noun) for thing in scene.things))

    training = {combination(scene) for scene in some(2000)}
    validation = {combination(scene) for scene in some(500, validation=True)}
    assert not training & validation
    assert {name for name, _ in validation} == {theme.name for theme in scenes.THEMES}


def test_captions_are_dense():
    lengths = [len(scenes.write_caption(scene, index).split()) for index, scene in enumerate(some())]
    assert 40 <= min(lengths) and max(lengths) <= 90 and 55 <= sum(lengths) / len(lengths) <= 75


def test_a_caption_tells_what_is_there():
    for index, scene in enumerate(some(50)):
        text = scenes.write_caption(scene, index)
        assert scene.theme.name in text and (scene.word or "") in text
        for thing in scene.things:
            assert f"{thing.size} {thing.colour} {thing.noun} is {scenes.PLACES[thing.cell]}" in text


def test_every_shape_is_drawn_and_every_label_known():
    shapes = {thing.shape for scene in some(2000) for thing in scene.things}
    assert shapes == {shape for theme in scenes.THEMES for shape in theme.things.values()}
    labels = set(scenes.all_labels())
    for index, scene in enumerate(some(200)):
        picture = scenes.render(scene, 48, index)
        assert picture.size == (48, 48) and len(picture.getcolors(48 * 48)) > 2
        assert set(scene.contents) <= labels


def test_answers_are_true():
    for index, scene in enumerate(some(100)):
        for question, answer in scenes.write_questions(scene, index):
            for thing in scene.things:
                if question == f"What colour is the {thing.noun}?":
                    assert answer == thing.colour
                if question == f"Where is the {thing.noun}?":
                    assert answer == scenes.PLACES[thing.cell]


def test_an_unknown_shape_is_an_error():
    thing = scenes.Thing("cube", "cube", "red", "small", (0, 0))
    with pytest.raises(ValueError, match="no such shape: cube"):
        scenes.render(scenes.Scene(scenes.THEMES[0], (thing,), None), 32, 0)
