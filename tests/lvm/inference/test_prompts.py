import io

import av
import numpy as np
import pytest
from PIL import Image

from lvm.common.errors import UserError
from lvm.data.images.preprocess import Preprocess
from lvm.inference import prompts
from tests.video_files import write_video

SIDE = 8
COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "black": (0, 0, 0)}


def save(path, color):
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (SIDE, SIDE), COLORS[color]).save(path)
    return str(path)


def read(path):
    try:
        return np.asarray(Image.open(path).convert("RGB").resize((SIDE, SIDE)))
    except OSError as error:
        raise UserError(f"{path}: can't be read as an image") from error


@pytest.fixture
def reader():
    return prompts.PromptReader(read, Preprocess(SIDE))


def center_colors(prompt):
    return [tuple(image[SIDE // 2, SIDE // 2].tolist()) for image in prompt.images]


def test_read_sequence_of_files_and_folders(reader, tmp_path):
    first = save(tmp_path / "a.png", "red")
    save(tmp_path / "more" / "frame10.png", "blue")
    save(tmp_path / "more" / "frame9.png", "green")
    (tmp_path / "more" / "notes.txt").write_text("not an image")
    prompt = reader.read_sequence([first, str(tmp_path / "more")])
    assert prompt.labels == ("1", "2", "3")
    assert center_colors(prompt) == [COLORS["red"], COLORS["green"], COLORS["blue"]]
    assert prompt.num_answers == 1
    two = prompts.PromptReader(read, Preprocess(SIDE), max_frames=1).read_sequence([first, str(tmp_path / "more")])
    assert center_colors(two) == [COLORS["red"], COLORS["green"]]


def test_encode_mp4_round_trip(reader, tmp_path):
    frames = np.stack([np.full((SIDE, SIDE, 3), 60 * index, np.uint8) for index in range(4)])
    path = tmp_path / "clip.mp4"
    path.write_bytes(prompts.encode_mp4(frames))
    with av.open(io.BytesIO(path.read_bytes())) as container:
        assert container.streams.video[0].frames == 4
        assert container.streams.video[0].width == 256
    prompt = reader.read_sequence([str(path)])
    np.testing.assert_allclose(prompt.images, frames, atol=6)
    assert len(prompts.PromptReader(read, Preprocess(SIDE), max_frames=2).read_sequence([str(path)]).images) == 2
    assert len(prompts.PromptReader(read, Preprocess(SIDE), rate=2.0).read_sequence([str(path)]).images) == 2


def test_reader_refuses_a_truncated_video(reader, tmp_path):
    path = tmp_path / "clip.avi"
    data = write_video(path).read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"clip\.avi: a packet after frame \d+ is damaged"):
        reader.read_sequence([str(path)])
    first = prompts.PromptReader(read, Preprocess(SIDE), max_frames=2).read_sequence([str(path)])
    assert len(first.images) == 2  # the damage comes later


def test_read_pairs_ends_with_the_query(reader, tmp_path):
    x, y = save(tmp_path / "x.png", "red"), save(tmp_path / "y.png", "green")
    prompt = reader.read_pairs([f"{x}:{y}", f"{y}:{x}"], x)
    assert prompt.labels == ("x1", "y1", "x2", "y2", "query")
    assert center_colors(prompt) == [COLORS[name] for name in ("red", "green", "green", "red", "red")]
    assert prompt.num_answers == 1


def test_read_pairs_with_two_answers(reader, tmp_path):
    x, y, z = (save(tmp_path / f"{name}.png", name) for name in ("red", "green", "blue"))
    prompt = reader.read_pairs([f"{x}:{y}:{z}"], x)
    assert prompt.labels == ("x1", "y1", "z1", "query")
    assert prompt.num_answers == 2


def test_read_pairs_overlays_what_is_not_black(reader, tmp_path):
    x, y = save(tmp_path / "x.png", "red"), save(tmp_path / "y.png", "green")
    half = np.zeros((SIDE, SIDE, 3), np.uint8)
    half[:, : SIDE // 2] = COLORS["blue"]
    Image.fromarray(half).save(tmp_path / "half.png")
    answer = reader.read_pairs([f"{x}:{y}+{tmp_path / 'half.png'}"], x).images[1]
    assert (answer[:, : SIDE // 2] == COLORS["blue"]).all()
    assert (answer[:, SIDE // 2 :] == COLORS["green"]).all()


def test_read_pairs_with_separators_in_names(reader, tmp_path):
    names = {"c++ 12:30": "red", "a+b:c": "green", "z": "blue"}
    x, y, z = (save(tmp_path / name / f"{name}.png", color) for name, color in names.items())
    prompt = reader.read_pairs([f"{x}:{y}"], z)
    assert center_colors(prompt) == [COLORS[name] for name in ("red", "green", "blue")]
    assert prompts.split_example(f"{x}:{y}+{z}:{y}") == [[x], [y, z], [y]]
    assert prompts.split_example("a+b.png:c.png") == [["a", "b.png"], ["c.png"]]  # none of them exists
    folders = f"{tmp_path / 'c++ 12:30'}:{tmp_path / 'a+b:c'}"
    with pytest.raises(UserError, match=r"c\+\+ 12:30 and .*a\+b:c are not two folders of images with the same names"):
        reader.read_pairs([folders], z)


def test_read_pairs_matches_folders_by_name(reader, tmp_path):
    for index, (x, y) in enumerate([("red", "green"), ("blue", "black")]):
        save(tmp_path / "photos" / f"{index}.png", x)
        save(tmp_path / "masks" / f"{index}.png", y)
    query = save(tmp_path / "q.png", "red")
    prompt = reader.read_pairs([f"{tmp_path / 'photos'}:{tmp_path / 'masks'}"], query)
    assert center_colors(prompt) == [COLORS[name] for name in ("red", "green", "blue", "black", "red")]
    save(tmp_path / "masks" / "2.png", "red")
    with pytest.raises(UserError, match="are not two folders of images"):
        reader.read_pairs([f"{tmp_path / 'photos'}:{tmp_path / 'masks'}"], query)


def test_gif_is_read_alike_everywhere(reader, tmp_path):
    frames = [Image.new("RGB", (SIDE, SIDE), color) for color in ("red", "green")]
    still, animated = tmp_path / "still.gif", tmp_path / "animated.gif"
    frames[0].save(still)
    frames[0].save(animated, save_all=True, append_images=frames[1:])
    prompt = reader.read_pairs([f"{still}:{still}"], str(still))
    assert center_colors(prompt) == [COLORS["red"]] * 3
    with pytest.raises(UserError, match=r"animated\.gif holds 2 images; give a single image"):
        reader.read_pairs([f"{still}:{animated}"], str(still))
    with pytest.raises(UserError, match=r"animated\.gif holds 2 images; give a single image"):
        reader.read_sequence([str(tmp_path)])


def test_reader_rejects_invalid_prompts(reader, tmp_path):
    x = save(tmp_path / "x.png", "red")
    (tmp_path / "empty").mkdir()
    none, empty = tmp_path / "none.png", tmp_path / "empty"
    for examples, query, words in [
        ([x], x, "is not of the form image.png:answer.png"),
        ([f"{x}:"], x, "is not of the form image.png:answer.png"),
        ([f"{x}:{x}", f"{x}:{x}:{x}"], x, "examples of 2 and 3 images"),
        ([f"{x}:{none}"], x, "none.png: can't be read as an image"),
        ([f"{empty}:{x}"], x, "empty holds no images"),
        ([f"{x}:{x}"], str(empty), "empty holds no images"),
    ]:
        with pytest.raises(UserError, match=words):
            reader.read_pairs(examples, query)
    broken = tmp_path / "clip.mp4"
    broken.write_bytes(b"no video")
    with pytest.raises(UserError, match=r"clip\.mp4"):
        reader.read_sequence([str(broken)])


def test_reader_checks_counts_before_reading(tmp_path):
    def check(count):
        if count > 2:
            raise UserError(f"{count} images don't fit")

    clip = tmp_path / "clip.mp4"
    clip.write_bytes(prompts.encode_mp4(np.zeros((3, SIDE, SIDE, 3), np.uint8)))
    for index in range(3):
        save(tmp_path / "photos" / f"{index}.png", "red")
    (tmp_path / "photos" / "._0.png").write_bytes(b"macOS metadata")
    photos, query = str(tmp_path / "photos"), save(tmp_path / "q.png", "red")

    def unread(path):
        raise AssertionError(path)

    reader = prompts.PromptReader(unread, Preprocess(SIDE), check_count=check)
    for ask in (lambda: reader.read_sequence([str(clip)]), lambda: reader.read_sequence([photos])):
        with pytest.raises(UserError, match="3 images don't fit"):
            ask()
    with pytest.raises(UserError, match="6 images don't fit"):
        reader.read_pairs([f"{photos}:{photos}"], query)
    two = prompts.PromptReader(read, Preprocess(SIDE), max_frames=2, check_count=check)
    assert len(two.read_sequence([str(clip)]).images) == len(two.read_sequence([photos]).images) == 2


def test_answer_sheet_has_a_row_per_candidate():
    images = np.zeros((3, SIDE, SIDE, 3), np.uint8)
    prompt = prompts.Prompt(("1", "2", "3"), images)
    one = prompts.answer_sheet(prompt, images[None, :2], side=32)
    three = prompts.answer_sheet(prompt, np.stack([images[:2]] * 3), side=32)
    assert one.shape[1] == three.shape[1] > 5 * 32
    assert three.shape[0] > 2.5 * one.shape[0]
