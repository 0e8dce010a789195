import io

import av
import numpy as np
import pytest
from PIL import Image

from lvm.common.errors import UserError
from lvm.data.images.preprocess import Preprocess
from lvm.inference import prompts

SIDE = 8
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "black": (0, 0, 0)}


def save(path, colour):
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (SIDE, SIDE), COLOURS[colour]).save(path)
    return str(path)


def read(path):
    try:
        return np.asarray(Image.open(path).convert("RGB").resize((SIDE, SIDE)))
    except OSError as error:
        raise UserError(f"{path}: can't be read as an image") from error


@pytest.fixture
def files():
    return prompts.PromptReader(read, Preprocess(SIDE))


def shown(prompt):
    """The colour at the middle of each image."""
    return [tuple(image[SIDE // 2, SIDE // 2].tolist()) for image in prompt.images]


def test_a_sequence_is_pictures_and_folders_in_natural_order(files, tmp_path):
    first = save(tmp_path / "a.png", "red")
    save(tmp_path / "more" / "frame10.png", "blue")
    save(tmp_path / "more" / "frame9.png", "green")
    (tmp_path / "more" / "notes.txt").write_text("no picture")
    prompt = files.sequence([first, str(tmp_path / "more")])
    assert prompt.labels == ("1", "2", "3")
    assert shown(prompt) == [COLOURS["red"], COLOURS["green"], COLOURS["blue"]]
    assert prompt.num_answers == 1
    two = prompts.PromptReader(read, Preprocess(SIDE), frames=1).sequence([first, str(tmp_path / "more")])
    assert shown(two) == [COLOURS["red"], COLOURS["green"]]


def test_a_video_that_was_written_is_read_as_a_sequence(files, tmp_path):
    frames = np.stack([np.full((SIDE, SIDE, 3), 60 * number, np.uint8) for number in range(4)])
    path = tmp_path / "clip.mp4"
    path.write_bytes(prompts.encode_mp4(frames))
    with av.open(io.BytesIO(path.read_bytes())) as container:
        assert container.streams.video[0].frames == 4
        assert container.streams.video[0].width == 256
    prompt = files.sequence([str(path)])
    np.testing.assert_allclose(prompt.images, frames, atol=6)
    assert len(prompts.PromptReader(read, Preprocess(SIDE), frames=2).sequence([str(path)]).images) == 2
    assert len(prompts.PromptReader(read, Preprocess(SIDE), rate=2.0).sequence([str(path)]).images) == 2


def test_pairs_end_with_the_query(files, tmp_path):
    x, y = save(tmp_path / "x.png", "red"), save(tmp_path / "y.png", "green")
    prompt = files.pairs([f"{x}:{y}", f"{y}:{x}"], x)
    assert prompt.labels == ("x1", "y1", "x2", "y2", "query")
    assert shown(prompt) == [COLOURS[name] for name in ("red", "green", "green", "red", "red")]
    assert prompt.num_answers == 1


def test_an_example_of_two_answers_asks_for_two(files, tmp_path):
    x, y, z = (save(tmp_path / f"{name}.png", name) for name in ("red", "green", "blue"))
    prompt = files.pairs([f"{x}:{y}:{z}"], x)
    assert prompt.labels == ("x1", "y1", "z1", "query")
    assert prompt.num_answers == 2


def test_two_answers_are_combined_into_one_by_what_is_not_black(files, tmp_path):
    x, y = save(tmp_path / "x.png", "red"), save(tmp_path / "y.png", "green")
    half = np.zeros((SIDE, SIDE, 3), np.uint8)
    half[:, : SIDE // 2] = COLOURS["blue"]
    Image.fromarray(half).save(tmp_path / "half.png")
    answer = files.pairs([f"{x}:{y}+{tmp_path / 'half.png'}"], x).images[1]
    assert (answer[:, : SIDE // 2] == COLOURS["blue"]).all()
    assert (answer[:, SIDE // 2 :] == COLOURS["green"]).all()


def test_two_folders_are_pairs_by_name(files, tmp_path):
    for number, (x, y) in enumerate([("red", "green"), ("blue", "black")]):
        save(tmp_path / "photos" / f"{number}.png", x)
        save(tmp_path / "masks" / f"{number}.png", y)
    query = save(tmp_path / "q.png", "red")
    prompt = files.pairs([f"{tmp_path / 'photos'}:{tmp_path / 'masks'}"], query)
    assert shown(prompt) == [COLOURS[name] for name in ("red", "green", "blue", "black", "red")]
    save(tmp_path / "masks" / "2.png", "red")
    with pytest.raises(UserError, match="are not two folders of pictures of the same names"):
        files.pairs([f"{tmp_path / 'photos'}:{tmp_path / 'masks'}"], query)


def test_what_cannot_be_asked_is_named(files, tmp_path):
    x = save(tmp_path / "x.png", "red")
    (tmp_path / "empty").mkdir()
    none, empty = tmp_path / "none.png", tmp_path / "empty"
    for examples, query, words in [
        ([x], x, "is not of the form image.png:answer.png"),
        ([f"{x}:"], x, "is not of the form image.png:answer.png"),
        ([f"{x}:{x}", f"{x}:{x}:{x}"], x, "examples of 2 and 3 images"),
        ([f"{x}:{none}"], x, "none.png: can't be read as an image"),
        ([f"{empty}:{x}"], x, "empty: holds no pictures"),
        ([f"{x}:{x}"], str(empty), "empty: holds no pictures"),
    ]:
        with pytest.raises(UserError, match=words):
            files.pairs(examples, query)
    broken = tmp_path / "clip.mp4"
    broken.write_bytes(b"no video")
    with pytest.raises(UserError, match=r"clip\.mp4"):
        files.sequence([str(broken)])


def test_what_is_too_much_is_refused_before_it_is_read(tmp_path):
    def check(count):
        if count > 2:
            raise UserError(f"{count} images don't fit")

    clip = tmp_path / "clip.mp4"
    clip.write_bytes(prompts.encode_mp4(np.zeros((3, SIDE, SIDE, 3), np.uint8)))
    for number in range(3):
        save(tmp_path / "photos" / f"{number}.png", "red")
    (tmp_path / "photos" / "._0.png").write_bytes(b"what some systems leave")
    photos, query = str(tmp_path / "photos"), save(tmp_path / "q.png", "red")

    def unread(path):
        raise AssertionError(path)

    files = prompts.PromptReader(unread, Preprocess(SIDE), check=check)
    for ask in (lambda: files.sequence([str(clip)]), lambda: files.sequence([photos])):
        with pytest.raises(UserError, match="3 images don't fit"):
            ask()
    with pytest.raises(UserError, match="6 images don't fit"):
        files.pairs([f"{photos}:{photos}"], query)
    two = prompts.PromptReader(read, Preprocess(SIDE), frames=2, check=check)
    assert len(two.sequence([str(clip)]).images) == len(two.sequence([photos]).images) == 2


def test_the_sheet_has_a_row_for_each_candidate():
    images = np.zeros((3, SIDE, SIDE, 3), np.uint8)
    prompt = prompts.Prompt(("1", "2", "3"), images)
    one = prompts.answer_sheet(prompt, images[None, :2], side=32)
    three = prompts.answer_sheet(prompt, np.stack([images[:2]] * 3), side=32)
    assert one.shape[1] == three.shape[1] > 5 * 32
    assert three.shape[0] > 2.5 * one.shape[0]
