"""Raw pictures and texts to features: encoders, order, equal and broken inputs, going on."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import open_clip
import pytest
import torch
from helpers import contents, ring_kg
from PIL import Image
from safetensors.torch import save_file

import imvia_graph as ig
from imvia_graph.cli import main
from imvia_graph.encode import encode_kg, encode_views, get_encoder
from imvia_graph.encode.encoder import weights_fingerprint
from imvia_graph.encode.pictures import MOST_PIXELS, BrokenPicture, open_picture

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A folder with the checkpoint and the configuration of a tiny CLIP of random weights."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    save_file(open_clip.CLIP(**TINY).state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY}))
    return folder


@pytest.fixture
def clip(clip_folder):
    return f"open_clip:local-dir:{clip_folder}"


def png(*, seed, size=(40, 30), **options):
    """The bytes of a picture of noise."""
    noise = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "png", **options)
    return file.getvalue()


def make_pictures(folder, entities, count):
    """``count`` pictures for the entities in turn, no two alike."""
    for i in range(count):
        path = folder / entities[i % len(entities)] / f"{i:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(seed=i))
    return folder


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """Runs imvia-graph in this process and in ``tmp_path``; exit status, output, errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        return ended.value.code, *capsys.readouterr()

    return run


class Mean(ig.encode.Encoder):
    """Mean colour; remembers what it was given."""

    name, modality, width, identity = "mean", "image", 3, "mean 1"

    def __init__(self):
        self.batches = []

    def encode(self, items):
        self.batches.append(len(items))
        return torch.stack([torch.tensor(np.asarray(i).mean((0, 1))) for i in items])


# -- order, equal and broken inputs ---------------------------------------------------------------


def test_views_are_sorted_by_entity_then_as_in_the_source(tmp_path, clip):
    entities = [f"e{i}" for i in range(12)]
    make_pictures(tmp_path, random.Random(0).sample(entities, 12), 30)
    raw = ig.io.read_images(tmp_path, entities)
    views, report = encode_views(raw, get_encoder(clip, "image"), batch_size=4, workers=5)
    assert views.entity.tolist() == sorted(views.entity.tolist())
    assert views.source == raw.source
    assert views.source == sorted(
        views.source, key=lambda path: (int(path[1:].split("/")[0]), path)
    )
    one_by_one = encode_views(raw, get_encoder(clip, "image"), batch_size=1, workers=1).views
    torch.testing.assert_close(views.feat, one_by_one.feat)
    assert (report.encoded, report.views) == (30, 30)
    assert torch.allclose(views.feat.norm(dim=1), torch.ones(30))


def test_equal_inputs_are_encoded_once_and_an_entity_has_them_once(tmp_path):
    same = png(seed=0)
    for name in ("a/1.png", "a/2.png", "b/1.png", "b/other.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(same if "1" in name or "2" in name else png(seed=1))
    encoder = Mean()
    raw = ig.io.read_images(tmp_path, ["a", "b"])
    views, report = encode_views(raw, encoder)
    assert encoder.batches == [2]
    assert views.source == ["a/1.png", "b/1.png", "b/other.jpg"]
    assert torch.equal(views.feat[0], views.feat[1])
    assert (report.encoded, report.equal, report.repeated) == (2, 1, 1)


def test_broken_pictures_are_reported_and_left_out(tmp_path):
    bad = {
        "cut.png": png(seed=0)[:200],
        "empty.png": b"",
        "text.jpg": b"this is text",
        "zbomb.png": None,
    }
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "good.png").write_bytes(png(seed=1))
    for name, content in bad.items():
        if content is None:
            Image.new("1", (12_000, 9_000)).save(tmp_path / "a" / name)
        else:
            (tmp_path / "a" / name).write_bytes(content)
    raw = ig.io.read_images(tmp_path, ["a"])
    missing = raw._replace(entity=torch.zeros(6).long(), source=[*raw.source, "a/gone.png"])
    views, report = encode_views(missing, Mean(), batch_size=2, cache=tmp_path / "cache")
    assert views.source == ["a/good.png"]
    reasons = dict(report.broken)
    assert reasons.keys() == {f"a/{name}" for name in [*bad, "gone.png"]}
    assert reasons["a/empty.png"] == "the file is empty"
    assert reasons["a/text.jpg"] == "it is not a picture in a known format"
    assert "12000 x 9000 pixels, more than 89,478,485" in reasons["a/zbomb.png"]
    assert reasons["a/gone.png"] == "No such file or directory"
    again = encode_views(missing, Mean(), batch_size=2, cache=tmp_path / "cache").report
    assert (dict(again.broken), again.encoded, again.reused) == (reasons, 0, 1)


def test_nothing_but_broken_pictures_is_an_error(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_bytes(b"x")
    with pytest.raises(ig.DataError, match=r"None of the 1 images can be read.*a/1\.png"):
        encode_views(ig.io.read_images(tmp_path, ["a"]), Mean())


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"])
def test_pictures_of_every_kind_become_rgb(mode):
    file = io.BytesIO()
    picture = Image.new("L", (5, 4), 200)
    if mode == "I;16":
        picture = Image.fromarray(np.full((4, 5), 200 << 8, dtype=np.uint16))
    else:
        picture = (Image.new("L", (5, 4), 255) if mode == "1" else picture).convert(mode)
    picture.save(file, "tiff")
    seen = open_picture(file.getvalue())
    assert (seen.mode, seen.size) == ("RGB", (5, 4))
    assert abs(np.asarray(seen).mean() - (255 if mode == "1" else 200)) < 2


def test_transparency_is_white_and_photographs_stand_upright():
    file = io.BytesIO()
    Image.new("RGBA", (2, 2), (0, 0, 0, 0)).save(file, "png")
    assert np.asarray(open_picture(file.getvalue())).min() == 255
    turned = Image.new("RGB", (6, 2))
    exif = turned.getexif()
    exif[0x0112] = 6  # lies on its side
    file = io.BytesIO()
    turned.save(file, "jpeg", exif=exif)
    assert open_picture(file.getvalue()).size == (2, 6)


def test_the_limit_of_pixels_is_pillows():
    assert MOST_PIXELS == Image.MAX_IMAGE_PIXELS
    with pytest.raises(BrokenPicture):
        open_picture(b"GIF89a")


# -- encoders -------------------------------------------------------------------------------------


def test_both_sides_of_a_clip_share_one_space_and_one_model(clip, clip_folder):
    image, text = get_encoder(clip, "image"), get_encoder(clip, "text")
    assert image.shared is text.shared
    assert image.width == text.width == 16
    assert image.identity != text.identity
    model = open_clip.CLIP(**TINY)
    open_clip.load_checkpoint(model, str(clip_folder / "open_clip_model.safetensors"))
    tokens = open_clip.SimpleTokenizer(context_length=16)(["a flag"])
    expected = torch.nn.functional.normalize(model.eval().encode_text(tokens), dim=1)
    torch.testing.assert_close(text.encode([text.prepare("a flag")]), expected)


def test_a_local_checkpoint_of_an_architecture(tmp_path, clip_folder, clip):
    config = tmp_path / "imvia-tiny.json"
    config.write_text(json.dumps(TINY))
    open_clip.add_model_config(config)
    weights = clip_folder / "open_clip_model.safetensors"
    encoder = get_encoder(f"open_clip:imvia-tiny/{weights}", "text")
    other = get_encoder(clip, "text")
    assert encoder.identity == other.identity
    torch.save({"state_dict": encoder.shared.model.state_dict()}, tmp_path / "x.pt")
    assert get_encoder(f"open_clip:imvia-tiny/{tmp_path / 'x.pt'}", "text").identity == (
        encoder.identity
    )
    (tmp_path / "bad.pt").write_bytes(b"no weights")
    with pytest.raises(ig.EncoderError, match=r"bad\.pt cannot be loaded .* nothing else is unp"):
        get_encoder(f"open_clip:imvia-tiny/{tmp_path / 'bad.pt'}", "text")


def test_long_texts_are_cut_by_the_tokenizer(clip):
    texts = ["word " * 100_000, "w" * 1_000_000]
    for encoder in (get_encoder(clip, "text"), get_encoder("minilm", "text")):
        features = encoder.encode([encoder.prepare(text) for text in texts])
        assert features.isfinite().all()


@pytest.mark.parametrize("name", ["clip", "minilm"])
def test_texts_longer_than_the_encoder_reads_are_counted_once_each_and_again_from_a_cache(
    name, clip, tmp_path
):
    encoder = get_encoder(clip if name == "clip" else name, "text")
    fits, most = ("word " * (encoder.context_length - 2), encoder.context_length)
    texts = [fits, fits + "more", "short", "w" * 1_000_000, "word " * 5000, "short", "é" * most]
    cut = [i for i, exceeds in enumerate(encoder.exceeds_context(texts)) if exceeds]
    whole = encoder.encode([encoder.prepare(text) for text in (fits, fits.strip())])
    torch.testing.assert_close(whole[0], whole[1])
    assert cut[:3] == [1, 3, 4]
    raw = ig.io.RawViews("text", torch.arange(8), [*texts, fits + "more"])
    first = encode_views(raw, encoder, batch_size=2, cache=tmp_path).report
    again = encode_views(raw, encoder, batch_size=3, cache=tmp_path).report
    assert (first.encoded, again.reused) == (6, 6)
    assert first.cut == again.cut == len(cut)
    assert first.context_length == most


def test_an_encoder_need_not_tell_what_it_reads():
    class Length(ig.encode.Encoder):
        name, modality, width, identity = "length", "text", 1, "length 1"

        def encode(self, items):
            return torch.tensor([[float(len(item))] for item in items])

    raw = ig.io.RawViews("text", torch.tensor([0]), ["word " * 1000])
    report = encode_views(raw, Length()).report
    assert (report.cut, report.context_length) == (0, None)


def test_the_command_says_how_many_texts_are_cut(tmp_path, command):
    ring_kg(views=False).save(tmp_path / "kg")
    (tmp_path / "texts.csv").write_text(f"e0;{'word ' * 300}\ne1;short\n")
    words = ["encode", "kg", "--texts", "texts.csv", "--text-encoder", "minilm"]
    assert "--text-separator ';'" in command(*words, "--out", "out")[2]
    code, _, errors = command(*words, "--out", "out", "--text-separator", ";")
    assert code == 0, errors
    told = " ".join(errors.split())
    assert "longer than minilm reads (256 tokens): 1 of 2 distinct texts" in told
    report = json.loads((tmp_path / "out" / "encode.json").read_text())[0]
    assert (report["cut"], report["context_length"]) == (1, 256)


def test_minilm_gives_the_features_of_countries():
    kg = ig.load_kg("countries")
    raw = ig.io.RawViews("text", torch.zeros(40).long(), kg.view_sources("text")[:40])
    feat = encode_views(raw, get_encoder("minilm", "text")).views.feat
    torch.testing.assert_close(feat, kg.views("text")[0][:40].float(), atol=5e-4, rtol=0)


def test_efficientnet_takes_pictures_of_any_shape():
    encoder = get_encoder("efficientnet-lite0", "image")
    pictures = [open_picture(png(seed=i, size=size)) for i, size in enumerate([(9, 99), (300, 7)])]
    features = encoder.encode([encoder.prepare(picture) for picture in pictures])
    assert features.shape == (2, 1280)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(2))


@pytest.mark.parametrize(
    ("spec", "modality", "message"),
    [
        ("resnet", "image", "There is no encoder 'resnet'; the encoders are clip, open_clip:ARCH"),
        ("minilm", "image", "'minilm' is for texts, not for images; .* 'efficientnet-lite0'"),
        ("efficientnet-lite0", "text", "is for images, not for texts; .* 'minilm'"),
        ("minilm:small", "text", "takes no argument after a colon"),
        ("minilm", "sound", "expected 'image' or 'text', received 'sound'"),
        ("open_clip:ViT-Z/x", "text", "open_clip has no architecture 'ViT-Z'"),
        (
            "open_clip:ViT-B-32/nix",
            "text",
            "'nix' is neither a checkpoint file nor one of .* openai",
        ),
        ("open_clip:local-dir:/nix", "text", "expected a folder with open_clip_config.json"),
    ],
)
def test_an_encoder_that_is_not_there(spec, modality, message):
    with pytest.raises(ig.EncoderError, match=message):
        get_encoder(spec, modality)


def test_no_network_is_said_at_once_with_the_way_out(tmp_path, command, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    (tmp_path / "texts.tsv").write_text("e0\ta\n")
    ring_kg(views=False).save(tmp_path / "kg")
    words = ["encode", "kg", "--texts", "texts.tsv", "--out", "out", "--encoder", "clip"]
    code, _, errors = command(*words)
    assert code == 2
    # What is fetched is also said, in a line before it.
    assert "open_clip:ViT-B-32-256/datacomp_s34b_b86k cannot be downloaded" in errors
    assert "hub.invalid" in errors
    assert "--text-encoder minilm" in errors
    assert not (tmp_path / "out").exists()


def test_what_is_fetched_is_said_before(caplog, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    monkeypatch.setattr("imvia_graph.encode.open_clip.getproxies", dict)
    with pytest.raises(ig.EncoderError, match=r"hub\.invalid"):
        get_encoder("open_clip:hf-hub:nobody/nothing", "image")
    assert "Downloading the weights of open_clip:hf-hub:nobody/nothing." in caplog.messages


@pytest.mark.parametrize(
    ("given", "modality"),
    [
        (["--texts", "texts.tsv"], "text"),
        (["--names"], "text"),
        (["--images", "images"], "image"),
        (["--images", "images", "--texts", "texts.tsv", "--text-encoder", "minilm"], "image"),
        (["--images", "images", "--names", "--image-encoder", "efficientnet-lite0"], "text"),
    ],
)
def test_no_encoder_is_taken_that_is_not_named(tmp_path, command, monkeypatch, given, modality):
    def never(*arguments):
        raise AssertionError("an encoder was made")

    monkeypatch.setattr("imvia_graph.encode.encode.get_encoder", never)
    (tmp_path / "texts.tsv").write_text("e0\ta\n")
    make_pictures(tmp_path / "images", ["e0"], 1)
    kg = ring_kg(views=False)
    kg.save(tmp_path / "kg")
    code, _, errors = command("encode", "kg", *given, "--out", "out")
    assert code == 2
    assert "none is downloaded unless you name it" in errors
    offline = {"text": "minilm", "image": "efficientnet-lite0"}[modality]
    assert f"--{modality}-encoder {offline} needs no network" in errors
    assert f"--{modality}-encoder clip downloads open_clip:ViT-B-32-256" in errors
    assert not (tmp_path / "out").exists()
    with pytest.raises(ig.EncoderError, match="No encoder of texts is named"):
        encode_kg(kg, texts=tmp_path / "texts.tsv")
    with pytest.raises(ig.EncoderError, match="No encoder of pictures is named"):
        encode_kg(kg, images=tmp_path / "images")


@pytest.mark.parametrize(
    "lure",
    [
        {"text_cfg": {"hf_model_name": "nobody/nothing", "hf_tokenizer_name": "nobody/nothing"}},
        {"vision_cfg": {"timm_model_name": "hf-hub:nobody/nothing", "image_size": 32}},
    ],
)
def test_a_folder_of_weights_that_names_others_has_nothing_fetched(
    clip_folder, tmp_path, monkeypatch, lure
):
    def never(*arguments, **options):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.getaddrinfo", never)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {**TINY, **lure}}))
    weights = clip_folder / "open_clip_model.safetensors"
    (tmp_path / weights.name).write_bytes(weights.read_bytes())
    with pytest.raises(ig.EncoderError, match="cannot be loaded") as error:
        get_encoder(f"open_clip:local-dir:{tmp_path}", "text")
    assert "the network was asked" not in str(error.value)


def test_clip_is_one_that_open_clip_knows():
    architecture, tag = ig.encode.CLIP.removeprefix("open_clip:").split("/")
    assert (architecture, tag) in open_clip.list_pretrained()


def test_an_encoder_of_another_package(monkeypatch, tmp_path):
    package = tmp_path / "mine-1.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Name: mine\nVersion: 1\n")
    (package / "entry_points.txt").write_text(
        "[imvia_graph.encoders]\nmine = mine:make\nlost = mine:gone\n"
    )
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "class Mine:\n"
        "    name, modality, width, identity = 'mine', 'text', 2, 'mine 1'\n"
        "    device = torch.device('cpu')\n"
        "    def __init__(self, argument):\n"
        "        self.factor = float(argument)\n"
        "    def prepare(self, item):\n"
        "        return len(item)\n"
        "    def encode(self, items):\n"
        "        return torch.tensor([[self.factor * n, 0.0] for n in items])\n"
        "def make(argument, modality, device):\n"
        "    return Mine(argument)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    raw = ig.io.RawViews("text", torch.tensor([0, 1]), ["abc", "de"])
    views = encode_views(raw, get_encoder("mine:2", "text")).views
    assert views.feat.tolist() == [[6, 0], [4, 0]]
    with pytest.raises(ig.EncoderError, match=r"'lost' \(mine:gone\) cannot be imported"):
        get_encoder("lost", "text")


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.ones(1, 2), r"returned features of shape \(1, 2\); expected \(2, 3\)"),
        (
            torch.full((2, 3), torch.nan),
            "returned NaN or infinite features for 'a'.*--precision float32",
        ),
    ],
)
def test_an_encoder_that_errs_is_named(features, message):
    class Wrong(ig.encode.Encoder):
        name, modality, width, identity = "wrong", "text", 3, "x"

        def encode(self, items):
            return features

    raw = ig.io.RawViews("text", torch.tensor([0, 1]), ["a", "b"])
    with pytest.raises(ig.EncoderError, match=f"'wrong' {message}"):
        encode_views(raw, Wrong())


def test_the_precision_can_be_asked_for(clip):
    raw = ig.io.RawViews("text", torch.tensor([0, 1]), ["a", "b"])
    encoder = get_encoder(clip, "text")
    full = encode_views(raw, encoder).views.feat
    half = encode_views(raw, encoder, precision="bfloat16").views.feat
    assert full.dtype == half.dtype == torch.float32
    assert not torch.equal(full, half)
    torch.testing.assert_close(full, half, atol=0.02, rtol=0)


def test_fingerprints_tell_weights_apart():
    one = torch.nn.Linear(2, 2)
    other = torch.nn.Linear(2, 2)
    assert weights_fingerprint(one) == weights_fingerprint(one)
    assert weights_fingerprint(one) != weights_fingerprint(other)
    assert weights_fingerprint(one, 224) != weights_fingerprint(one, 225)


# -- going on -------------------------------------------------------------------------------------


def test_a_second_run_finds_what_was_done_and_encodes_what_is_new(tmp_path):
    images = make_pictures(tmp_path / "images", ["a", "b"], 10)
    encoder = Mean()
    options = {"batch_size": 4, "cache": tmp_path / "cache"}
    first = encode_views(ig.io.read_images(images, ["a", "b"]), encoder, **options)
    assert encoder.batches == [4, 4, 2]
    (images / "a" / "new.png").write_bytes(png(seed=99))
    (part, *_) = (tmp_path / "cache").rglob("part-*")
    part.write_bytes(b"damaged")
    lost = (
        10 - encode_views(ig.io.read_images(images, ["a", "b"]), encoder, **options).report.reused
    )
    assert lost in (2, 4)
    assert sum(encoder.batches) == 10 + lost + 1
    assert (
        encode_views(ig.io.read_images(images, ["a", "b"]), encoder, **options).report.encoded == 0
    )
    other = Mean()
    other.identity = "mean 2"
    assert encode_views(ig.io.read_images(images, ["a", "b"]), other, **options).report.reused == 0
    assert first.views.source == sorted(first.views.source)


def test_a_cache_that_holds_an_input_twice_gives_each_its_own_features(tmp_path):
    # As two runs that encode at the same time leave it, whose batches are not the same.
    images = make_pictures(tmp_path / "images", ["a", "b"], 10)
    raw = ig.io.read_images(images, ["a", "b"])
    cache = tmp_path / "cache"
    encode_views(raw, Mean(), batch_size=4, cache=cache)
    encode_views(raw, Mean(), batch_size=3, cache=tmp_path / "other")
    for part in (tmp_path / "other").rglob("part-*"):
        (target,) = cache.iterdir()
        part.rename(target / part.name)
    for seed in (97, 98, 99):
        (images / "a" / f"new{seed}.png").write_bytes(png(seed=seed))
    raw = ig.io.read_images(images, ["a", "b"])
    found = encode_views(raw, Mean(), batch_size=2, cache=cache)
    assert (found.report.encoded, found.report.reused) == (3, 10)
    assert torch.equal(found.views.feat, encode_views(raw, Mean()).views.feat)


def test_killed_and_run_again_it_goes_on(tmp_path, clip, command):
    kg = ring_kg(views=False)
    kg.save(tmp_path / "kg")
    images = make_pictures(tmp_path / "images", kg.entities, 200)
    (images / "e3" / "broken.png").write_bytes(b"x")
    encode = ["encode", "kg", "--images", "images", "--encoder", clip, "--batch-size", "8"]
    encode += ["--device", "cpu"]
    status, _, errors = command(*encode, "--out", "whole")
    assert status == 0, errors
    assert "1 broken image is left out." in errors
    assert "broken: e3/broken.png: it is not a picture in a known format" in errors
    assert not (tmp_path / "whole" / ".encode").exists()

    encode += ["--out", "again", "--cache", "cache"]
    # Few pixels make for a quick run; stopped while a part file is being renamed, say.
    process = subprocess.Popen(
        [sys.executable, "-m", "imvia_graph", *encode],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    end = time.monotonic() + 120
    while len(parts := list((tmp_path / "cache").rglob("part-*.safetensors"))) < 5:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < end
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = len(list((tmp_path / "cache").rglob("part-*.safetensors")))
    assert 5 <= len(parts) <= kept < 25
    assert not (tmp_path / "again" / "kg.json").exists()

    status, _, errors = command(*encode, "--strict")
    assert status == 1, errors  # of the broken picture
    (log,) = (tmp_path / "cache").rglob("log.jsonl")
    events = [json.loads(line) for line in log.read_text().splitlines()]
    started = sum(event["inputs"] for event in events if event["event"] == "start")
    done = sum(event["inputs"] for event in events if event["event"] == "done")
    assert 200 <= started <= 208  # the batch in hand, at most, is encoded again
    assert 192 <= done <= 208
    (report,) = json.loads((tmp_path / "again" / "encode.json").read_text())
    assert report["reused"] + report["encoded"] == 200
    assert report["reused"] >= 8 * kept - 8
    mine, theirs = contents(tmp_path / "again" / "views"), contents(tmp_path / "whole" / "views")
    assert mine == theirs


# -- the command and the whole graph --------------------------------------------------------------


def test_the_command_encodes_pictures_and_texts(tmp_path, clip, command):
    kg = ring_kg(views=False)
    kg.save(tmp_path / "kg")
    make_pictures(tmp_path / "images", kg.entities[:5], 12)
    (tmp_path / "texts.csv").write_text("who,what\ne1,one\ne1,uno\nx,none\ne0,\n")
    words = ["encode", "kg", "--images", "images", "--texts", "texts.csv", "--out", "out"]
    words += ["--text-columns", "who,what", "--encoder", clip]
    code, _, errors = command(*words)
    assert code == 2
    assert "1 of 4 rows name 1 entities" in errors
    assert not (tmp_path / "out").exists()
    code, output, errors = command(*words, "--skip-unknown")
    assert (code, output) == (0, "KG folder: out\n"), errors
    made = ig.load_kg(tmp_path / "out", "published")
    assert {m: tuple(made.views(m)[0].shape) for m in made.modalities} == {
        "image": (12, 16),
        "text": (2, 16),
    }
    assert made.view_sources("text") == ["one", "uno"]
    assert made.view_sources("image")[0] == "e0/00000.png"
    assert torch.equal(made.train, kg.train)
    assert "out is not empty" in command(*words, "--skip-unknown")[2]
    old = made.replace(views={"audio": made._views("text")})
    old.save(tmp_path / "out")
    assert command(*words, "--skip-unknown", "--overwrite")[0] == 0
    assert ig.load_kg(tmp_path / "out", "published").modalities == ["image", "text"]


def test_the_command_encodes_the_literals_of_rdf(tmp_path, command):
    kg = ring_kg(views=False)
    kg.save(tmp_path / "kg")
    entity = "urn:imvia:entity:"
    turtle = f"""
    @prefix e: <http://e/> .
    <{entity}e1> e:about "one"@en, "eins"@de ; e:code "0001" ; e:size 1 .
    <{entity}e0> e:about "zero", "null"@de . <{entity}other> e:about "nothing"@en .
    """
    (tmp_path / "g.ttl").write_text(turtle)
    words = ["encode", "kg", "--texts", "g.ttl", "--encoder", "minilm", "--overwrite"]

    def texts(*options):
        code, _, errors = command(*words, "--out", "out", *options)
        assert code == 0, errors
        return ig.load_kg(tmp_path / "out", "published").view_sources("text")

    assert texts() == ["zero", "null", "one", "eins", "0001"]
    assert texts("--text-language", "en") == ["zero", "one", "0001"]
    about = ["--text-predicate", "http://e/about"]
    assert texts(*about, "--text-language", "de") == ["zero", "null", "eins"]
    for options, message in (
        (["--text-predicate", "http://e/size"], "expected text literals with these predicates"),
        (["--text-columns", "0,1"], "--text-columns is for tables; g.ttl is RDF"),
        (["--texts", "t.tsv", *about], "--text-predicate and --text-language are for"),
        (["--texts", "missing.nt"], "missing.nt: there is no such file"),
    ):
        code, _, errors = command(*words, "--out", "other", *options)
        assert code == 2
        assert message in errors
    assert not (tmp_path / "other").exists()


def test_the_command_leaves_files_of_others_alone(tmp_path, command):
    kg = ring_kg(views=False)
    kg.save(tmp_path / "kg")
    (tmp_path / "texts.tsv").write_text("e0\tzero\n")
    (tmp_path / "out" / "views" / "holidays").mkdir(parents=True)
    (tmp_path / "out" / "views" / "holiday.jpg").write_bytes(b"a picture")
    (tmp_path / "out" / "train.tsv").write_text("mine")
    words = ["encode", "kg", "--texts", "texts.tsv", "--encoder", "minilm", "--out", "out"]
    before = contents(tmp_path / "out")
    code, _, errors = command(*words)
    assert code == 2
    assert "out is not empty. Name another folder, or give --overwrite." in errors
    assert contents(tmp_path / "out") == before
    assert "is a file" in command(*words[:-1], "texts.tsv")[2]
    assert command(*words, "--overwrite")[0] == 0
    assert (tmp_path / "out" / "views" / "holiday.jpg").read_bytes() == b"a picture"
    assert (tmp_path / "out" / "views" / "holidays").is_dir()
    (tmp_path / "stopped" / ".encode").mkdir(parents=True)
    assert command(*words[:-1], "stopped")[0] == 0
    assert not (tmp_path / "stopped" / ".encode").exists()


def test_the_command_says_what_is_wrong_with_its_options(tmp_path, command):
    ring_kg(views=False).save(tmp_path / "kg")
    code, _, errors = command("encode", "kg", "--out", "o")
    assert code == 2
    assert "give --images, --texts or --names" in errors
    code, _, errors = command("encode", "kg", "--out", "o", "--texts", "t", "--text-columns", "a")
    assert code == 2
    assert "expected two columns, as in entity,caption or 0,3" in errors


def test_no_views_are_refused():
    raw = ig.io.RawViews("text", torch.empty(0, dtype=torch.int64), [])
    with pytest.raises(ig.DataError, match="There are no texts to encode"):
        encode_views(raw, get_encoder("minilm", "text"))


def test_views_that_were_there_are_kept(tmp_path, clip):
    kg = ring_kg()
    (tmp_path / "texts.tsv").write_text("e0\tzero\n")
    seen, (report,) = encode_kg(kg, texts=tmp_path / "texts.tsv", text_encoder=clip)
    assert (report.modality, report.views) == ("text", 1)
    assert seen.views("text")[0].shape == (1, 16)
    assert torch.equal(seen.views("image")[0], kg.views("image")[0])
    with pytest.raises(ig.DataError, match="nothing to encode"):
        encode_kg(kg)
