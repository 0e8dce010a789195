"""The demo at tiny size: every command in order on generated scenes; messages for bad input."""

from __future__ import annotations

import json
import pathlib
import re

import numpy as np
import pytest
from PIL import Image

from lvm import LVM
from lvm.common.errors import UserError
from lvm.data.store import failures
from lvm.inference.sampling import SamplingParams
from lvm.training import metrics
from scripts.demo import warn_if_not_below_unigram
from tests.commands import ROOT, SHARED_DATA, TINY_DEMO, comparable_results, run, start
from tokenizer import Tokenizer


def test_page_embeds_pictures_and_needs_no_network(demo):
    page = (demo / "index.html").read_text()
    assert not re.search(r"https?://", page)
    assert page.count("data:image/png;base64,") >= 7
    for heading in ("Video, continued", "Segmentation, by example", "Depth, by example", "Reconstructions"):
        assert f"<h3>{heading}</h3>" in page


def test_results_have_every_figure(demo):
    results = json.loads((demo / "results.json").read_text())
    figures = results["figures"]
    assert {"depth", "edges", "likelihood", "perplexity", "reconstruction", "segmentation", "task_following"} <= set(
        figures
    )
    assert list(figures["likelihood"]["loss"]["baselines"]) == ["unigram entropy of the same codes"]
    iou = figures["segmentation"]["foreground_iou"]
    assert 0 <= iou["value"] <= 1
    assert "interval" not in iou  # of seven originals
    baselines = {"copied example", "copied query", "mean image", "nearest training neighbor", "all foreground"}
    assert set(iou["baselines"]) == baselines
    assert iou["value"] < iou["ceiling"]["value"]
    assert "8 queries of 7 originals" in iou["text"]
    by_codes = {"by_codes", *(f"by_codes/{target}" for target in ("segmentation", "depth", "edges"))}
    assert by_codes < set(figures["task_following"])
    assert {"video_loss/video", "video_perplexity_ratio/video"} <= set(figures["likelihood"])
    assert json.loads((demo / "evaluations" / "depth.json").read_text())["episodes"][0]["query"]


def test_training_writes_metrics_and_pictures(demo):
    lines = metrics.read_metrics(demo / "lvm")
    assert [line["step"] for line in lines] == list(range(10, 61, 10))
    wanted = {"step", "tokens", "loss", "perplexity", "grad_norm", "param_norm", "learning_rate"}
    wanted |= {"tokens_per_second", "step_seconds", "input_wait_fraction"}
    assert all(wanted <= set(line) for line in lines)
    assert "heldout_loss" in lines[-1]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert Image.open(demo / "lvm" / "pictures" / "answers-video-0000060.png").width > 100
    assert {"heldout_psnr/rgb", "heldout_ssim/rgb"} <= set(metrics.read_metrics(demo / "tokenizer")[-1])
    assert (demo / "tokenizer" / "pictures" / "reconstructions-0000060.png").exists()


def test_second_run_redoes_nothing(demo):
    before = {path: path.stat().st_mtime_ns for path in demo.rglob("*.json") if path.name != "config.json"}
    output = run("scripts.demo", *TINY_DEMO, f"--out={demo}")
    assert output.count("training is complete at step 60") == 2
    assert "results.json is up to date" in output
    assert re.search(r"^reconstruction: psnr/rgb +\d+\.\d dB ", output, re.MULTILINE)  # printed again
    assert "answer.png exists already" in output
    manifest = list((demo / "store").glob("manifest.*"))
    assert all(path.stat().st_mtime_ns == before[path] for path in before if path not in manifest)


def test_tokenizer_api_in_two_lines(demo):
    t = Tokenizer.load(demo / "tokenizer")
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    codes = t.encode(images)
    assert (codes.shape, codes.dtype) == ((3, 16), np.int32)
    np.testing.assert_array_equal(t.encode(images[1:2])[0], codes[1])
    decoded, exact = t.decode(codes), t.decode_float(codes)
    assert (decoded.shape, decoded.dtype) == ((3, 32, 32, 3), np.uint8)
    np.testing.assert_array_equal(decoded, np.round(255 * np.clip(exact, 0, 1)))
    latents = t.encode_latents(images)
    assert (latents.shape, latents.dtype) == ((3, 16, 4), np.float32)
    np.testing.assert_allclose(latents, t.encode_latents(images / np.float32(255)), atol=1e-5)
    rounded = Tokenizer.load(demo / "tokenizer", dtype="bfloat16").decode(codes)
    assert 0 < np.abs(rounded.astype(int) - decoded).mean() < 2


def test_tokenizer_rejects_bad_images_and_codes(demo):
    t = Tokenizer.load(demo / "tokenizer")
    with pytest.raises(UserError, match="`preprocess` resizes any image"):
        t.encode(np.zeros((1, 48, 64, 3), np.uint8))
    with pytest.raises(UserError, match="float32, expected uint8"):
        t.encode(np.zeros((1, 32, 32, 3), np.float32))
    with pytest.raises(UserError, match=r"the codebook has 0\.\.63"):
        t.decode(np.full((1, 16), 64))
    assert t.preprocess(np.zeros((48, 64, 3), np.uint8)).shape == (32, 32, 3)


def test_model_api_in_two_lines(demo):
    m = LVM.load(demo / "lvm")
    grids = np.random.default_rng(0).integers(0, 64, (2, 3, 16))
    tokens = np.concatenate([[[m.vocabulary.bos]] * 2, grids.reshape(2, -1)], axis=1)
    logits = m.logits(tokens)
    assert (logits.shape, logits.dtype) == ((2, 49, m.vocabulary.size), np.float32)
    answers = m.generate(grids, 2, temperature=0)
    assert (answers.shape, answers.dtype) == ((2, 2, 16), np.int32)
    assert answers[0, 0, 0] == logits[0, -1, :64].argmax()
    raw = m.generate_tokens(tokens, 32, SamplingParams(0.0), codes_only=True)
    np.testing.assert_array_equal(raw.reshape(2, 2, 16), answers)
    assert m.generate(grids, 1, candidates=3, seed=[1, 2]).shape == (2, 3, 1, 16)
    unequal = m.generate([grids[0], grids[1, :1]], 2, temperature=0)
    np.testing.assert_array_equal(unequal[0], answers[0])
    assert m.generate(np.zeros((1, 5, 16), int), 3, temperature=0).shape == (1, 3, 16)  # the window slides
    with pytest.raises(UserError, match="a prompt of 6 images and an answer don't fit"):
        m.generate(np.zeros((1, 6, 16), int), 1)
    with pytest.raises(UserError, match="tokens: float32"):
        m.logits(np.zeros((1, 4), np.float32))


def test_prompt_answers_pairs_and_query(demo, tmp_path):
    frames = sorted((demo / "prompt").glob("*.png"))
    pairs = [f"{frames[0]}:{frames[1]}", f"{frames[1]}:{frames[2]}"]
    out = tmp_path / "answer.png"
    common = [f"--model={demo / 'lvm'}", f"--tokenizer={demo / 'tokenizer'}", f"--out={out}"]
    (tmp_path / "answer").mkdir()
    (tmp_path / "answer" / "candidate-7-image-1.png").write_bytes(b"of a prompt before")
    run("lvm.prompt", "--pairs", *pairs, "--query", frames[2], *common, "--candidates=2", "--temperature=1")
    assert Image.open(out).height > 200  # a row for each candidate
    singles = sorted(path.name for path in (tmp_path / "answer").iterdir())
    assert singles == ["candidate-1-image-1.png", "candidate-2-image-1.png"]
    assert Image.open(tmp_path / "answer" / singles[0]).size == (32, 32)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sequence", "nothing.png"], "nothing.png: can't be read as an image"),
        (["--sequence", "README.md"], "README.md: can't be read as an image"),
        (["--pairs", "a.png"], "--pairs needs --query"),
        (["--pairs", "a.png", "--query=b.png"], "'a.png' is not of the form image.png:answer.png"),
        ([], "give either --sequence"),
        (["--sequence", *["FRAME"] * 9], "holds 6 images"),
        (
            ["--sequence", "FRAME", "--frames=2"],
            "--frames=2 applies to folders and videos, and the prompt has none",
        ),
        (["--sequence", "FRAME", "--rate=2"], "--rate=2 applies to videos, and the prompt has none"),
        (
            ["--pairs", "FRAME:FRAME", "--query=FRAME", "--frames=3"],
            "--frames=3 applies to folders and videos",
        ),
        (["--sequence", "FRAME", "--candidates=2"], "--candidates has no effect with --temperature=0"),
        (["--sequence", "FRAME", "--top_k=5"], "--top_k has no effect with --temperature=0"),
    ],
)
def test_prompt_bad_input_is_one_line(demo, tmp_path, arguments, words):
    arguments = [a.replace("FRAME", str(demo / "prompt" / "frame-1.png")) for a in arguments]
    common = [f"--model={demo / 'lvm'}", f"--tokenizer={demo / 'tokenizer'}", f"--out={tmp_path / 'a.png'}"]
    output = run("lvm.prompt", *arguments, *common, code=2)
    assert output.count("\n") == 1, output
    assert words in output


@pytest.mark.parametrize(
    ("module", "arguments", "words"),
    [
        ("lvm.train", ["--config=configs/demo_lvm.py", "--config.model.depth=3"], "depth"),
        ("lvm.train", ["--config=configs/demo_lvm.py", "--config.model.num_heads=3"], "num_heads=3 must"),
        ("lvm.train", ["--config=configs/demo_lvm.py", "--config.batch_size=many"], "batch_size"),
        ("lvm.train", ["--config=configs/demo_lvm.py", "--config.seed=-1"], "config.seed=-1 must not be negative"),
        ("lvm.train", ["--config=configs/demo_lvm.py", "--config.speed=1"], "--config: no such key: 'speed'"),
        (
            "lvm.train",
            ["--config=configs/demo_lvm.py", "--config.loop.total_step=1"],
            "no such key: 'total_step'; did you mean \"total_steps\"",
        ),
        (
            "lvm.train",
            ["--config=configs/demo_lvm.py", "--config.data.heldout_fraction=2"],
            "config.data.heldout_fraction=2.0 must be in [0, 1)",
        ),
        (
            "tokenizer.train",
            ["--config=configs/demo_tokenizer.py", "--config.preprocess.resizer=opencv"],
            "error: config.preprocess.resizer='opencv' must be one of pillow, swscale",
        ),
        ("lvm.train", ["--config=configs/nothing.py"], "configs/nothing.py"),
        (
            "lvm.train",
            ["--config=configs/demo_lvm.py", "--config.data.store=/none"],
            "missing: depth, edges, segmentation, video (/none doesn't exist; tokenizer.encode writes a store)",
        ),
        (
            "tokenizer.train",
            ["--config=configs/demo_tokenizer.py", "--config.data.source=/none"],
            "/none: found nothing",
        ),
        ("tokenizer.train", ["--config=configs/demo_tokenizer.py", "--speed=9"], "speed"),
    ],
)
def test_bad_config_is_one_line(tmp_path, module, arguments, words):
    output = run(module, *arguments, f"--workdir={tmp_path / 'w'}", code=2)
    assert len(output.strip().splitlines()) == 1, output
    assert words in output


def test_workdir_of_another_config_is_rejected(demo):
    output = run(
        "lvm.train",
        "--config=tests/configs/tiny_lvm.py",
        f"--workdir={demo / 'lvm'}",
        f"--config.data.store={demo / 'store'}",
        "--config.optimizer.learning_rate=0.5",
        code=2,
    )
    assert "config.optimizer.learning_rate: 0.0025 → 0.5" in output


def test_tokenizer_folder_is_not_a_model(demo, tmp_path):
    common = ["--config=tests/configs/tiny_eval.py", f"--out={tmp_path}"]
    output = run("lvm.evaluate", *common, f"--model={demo / 'tokenizer'}", f"--tokenizer={demo / 'tokenizer'}", code=2)
    assert "holds 'tokenizer', expected the workdir of a model of kind 'lvm'" in output


def test_bad_image_folder_fails_early(tmp_path):
    assert "expected a folder of images" in run("scripts.demo", "--images=/no/such/folder", code=2)
    assert str(tmp_path) in run("scripts.demo", f"--images={tmp_path}", code=2)


def write_folder(folder: pathlib.Path) -> None:
    rng = np.random.default_rng(0)
    for video in range(4):
        for stream in ("rgb", "segmentation"):
            (folder / stream / f"video{video}").mkdir(parents=True)
        for frame in range(8):
            pixels = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
            picture = Image.fromarray(pixels).resize((64, 48), Image.Resampling.BICUBIC)
            picture.save(folder / "rgb" / f"video{video}" / f"{frame:03d}.jpg")
            labels = Image.fromarray((np.asarray(picture).mean(-1) > 128).astype(np.uint8), mode="P")
            labels.putpalette([0, 0, 0, 255, 0, 0])
            labels.save(folder / "segmentation" / f"video{video}" / f"{frame:03d}.png")


@pytest.mark.slow
def test_corrupt_jpeg_is_listed_and_skipped(tmp_path):
    images, out = tmp_path / "images", tmp_path / "out"
    write_folder(images)
    broken = images / "rgb" / "video1" / "003.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    (images / "notes.txt").write_text("not an image")
    output = run("scripts.demo", *TINY_DEMO[1:], f"--images={images}", f"--out={out}")
    assert "video1/003.jpg" in output
    assert "notes.txt" in output
    manifest = json.loads((out / "store" / "manifest.json").read_text())
    assert manifest["images"] == 2 * (4 * 8 - 1)
    listed = list(failures.read(out / "store"))
    assert len(listed) == 1
    assert "003.jpg" in listed[0]["reason"]
    figures = json.loads((out / "results.json").read_text())["figures"]["reconstruction"]
    assert {"psnr/rgb", "psnr/segmentation"} == {name for name in figures if name.startswith("psnr/")}


@pytest.mark.parametrize(("loss", "warned"), [(5.9, True), (5.8, True), (5.7, False), (None, False)])
def test_demo_warns_if_loss_is_not_below_unigram(tmp_path, caplog, loss, warned):
    figure = {"value": loss, "baselines": {"unigram entropy of the same codes": {"value": 5.8}}}
    figures = {"likelihood": {"loss": figure}} if loss else {}
    (tmp_path / "results.json").write_text(json.dumps({"figures": figures}))
    warn_if_not_below_unigram(tmp_path)
    assert ("is not below the unigram entropy" in caplog.text) == warned


@pytest.mark.slow
@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="needs the real images of ../shared/data")
@pytest.mark.parametrize("name", ["camvid", "davis", "photos", "objects", "bsds", "pose", "coco"])
def test_demo_on_real_images(tmp_path, name):
    run("scripts.demo", *TINY_DEMO[1:], f"--images={SHARED_DATA / name}", f"--out={tmp_path}")
    assert (tmp_path / "index.html").exists()


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="needs the real images of ../shared/data")
def test_single_video_cannot_be_held_out(tmp_path):
    arguments = [*TINY_DEMO[1:], f"--images={SHARED_DATA / 'depth'}", f"--out={tmp_path}"]
    process = start("scripts.demo", *arguments)
    assert "heldout_fraction=0.15 needs at least two images" in process.communicate()[0]
    assert process.returncode == 2


@pytest.mark.slow
def test_evaluation_reruns_for_another_model_of_same_step(demo, tmp_path):
    model, out = tmp_path / "lvm", tmp_path / "out"
    store = f"--config.data.store={demo / 'store'}"
    run("lvm.train", "--config=tests/configs/tiny_lvm.py", f"--workdir={model}", store, "--config.seed=7")
    common = ["--config=tests/configs/tiny_eval.py", f"--tokenizer={demo / 'tokenizer'}", f"--out={out}"]
    run("lvm.evaluate", *common, f"--model={demo / 'lvm'}")
    first = comparable_results(out / "results.json")
    assert "is up to date" in run("lvm.evaluate", *common, f"--model={demo / 'lvm'}")
    assert "is up to date" not in run("lvm.evaluate", *common, f"--model={model}")
    assert comparable_results(out / "results.json") != first


def test_evaluation_of_unseen_source_needs_flag(demo, tmp_path):
    write_folder(tmp_path / "images")
    common = [
        "--config=tests/configs/tiny_eval.py",
        f"--model={demo / 'lvm'}",
        f"--tokenizer={demo / 'tokenizer'}",
    ]
    common += [f"--config.source={tmp_path / 'images'}", f"--out={tmp_path / 'out'}"]
    assert "is not what the model was trained on" in run("lvm.evaluate", *common, code=2)
    run("lvm.evaluate", *common, "--config.unseen=true")
    assert json.loads((tmp_path / "out" / "results.json").read_text())["heldout_scenes"] == 4


def test_store_rejects_second_source(demo, tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        (tmp_path / name).mkdir()
        rng = np.random.default_rng(seed)
        for number in range(6):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    common = [f"--tokenizer={demo / 'tokenizer'}", f"--out={tmp_path / 'store'}"]
    run("tokenizer.encode", *common, f"--source={tmp_path / 'a'}")
    shard = next((tmp_path / "store").glob("shard-00001*.codes"))
    whole = shard.read_bytes()
    shard.unlink()
    assert "holds codes made with other settings" in run(
        "tokenizer.encode", *common, f"--source={tmp_path / 'b'}", code=2
    )
    run("tokenizer.encode", *common, f"--source={tmp_path / 'a'}")
    assert shard.read_bytes() == whole  # a lost shard is written again, to the same bytes


def test_readme_shows_picture_of_demo():
    picture = re.search(r"\((docs/[^)]+\.(?:png|webp))\)", (ROOT / "README.md").read_text())
    assert picture
    assert (ROOT / picture[1]).stat().st_size < 300_000
