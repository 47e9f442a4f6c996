"""``predict``, ``filters``, ``compare``: their numbers against plain PyTorch's, and their files."""

import json

import pytest
import torch
import torch.nn.functional as F

from fastcls import recipes
from fastcls.cli import main
from fastcls.compare import Side, clock_name, compare, take_turns
from fastcls.data import digits
from fastcls.errors import UserError
from fastcls.files import read_records
from fastcls.filters import LAYER_FILTERS, PHOTO_FILTERS, activation_maps, draw, filter_photo
from fastcls.predict import Predictor
from fastcls.runs import run
from fastcls.train import Trainer

Image = pytest.importorskip("PIL.Image")
np = pytest.importorskip("numpy")
for extra in ("matplotlib", "sklearn", "torchvision", "tqdm"):
    pytest.importorskip(extra)

from fastcls import plots  # noqa: E402  needs matplotlib

PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "digits"
    assert run("digits", folder, epochs=2, batch_size=64)
    return folder


def error_of(capsys, *arguments):
    assert main(list(arguments)) == 2
    return capsys.readouterr().err


def pixels_of(file):
    return np.asarray(Image.open(file).convert("L"))


@pytest.mark.parametrize("layers", ["fused", "native"])
def test_predictor_has_the_accuracy_of_the_run(layers, folder):
    _, test, _ = digits()
    guesses = Predictor(folder / "best.pt", layers=layers)(test.images)
    torch.testing.assert_close(guesses.sum(1), torch.ones(len(guesses)))
    accuracy = (guesses.argmax(1) == test.labels).double().mean().item()
    assert accuracy == read_records(folder / "metrics.jsonl")[-1]["test_accuracy"]


def test_predict_prints_and_draws(folder, tmp_path, capsys):
    _, test, _ = digits()
    files = []
    for i in range(3):
        files.append(str(tmp_path / f"{i}.png"))
        Image.fromarray(test.images[i, 0].numpy()).save(files[-1])
    picture = tmp_path / "top.png"
    assert main(["predict", str(folder / "last.pt"), *files, "--out", str(picture)]) == 0
    lines = capsys.readouterr().out.splitlines()
    expected = Predictor(folder / "last.pt")(test.images[:3])
    for i, file in enumerate(files):
        assert lines[6 * i] == file
        shown = [line.split() for line in lines[6 * i + 1 : 6 * i + 6]]
        best = expected[i].topk(5)
        assert [name for name, _ in shown] == [str(n) for n in best.indices.tolist()]
        assert [text for _, text in shown] == [f"{p:.2%}" for p in best.values.tolist()]
    assert picture.read_bytes().startswith(PNG)


def test_predict_tells_of_dark_on_light_and_inverts(folder, tmp_path, capsys):
    _, test, _ = digits()
    files = [str(tmp_path / name) for name in ("light.png", "dark.png")]
    for file, image in zip(files, (test.images[0, 0], 255 - test.images[0, 0]), strict=True):
        Image.fromarray(image.numpy()).save(file)
    command = ["predict", str(folder / "best.pt"), "--out", str(tmp_path / "top.png")]
    assert main([*command, *files]) == 0
    plain = capsys.readouterr()
    assert "note: dark on light, where the model learned from light on dark" in plain.err
    assert files[1] in plain.err and files[0] not in plain.err and "with --invert" in plain.err
    assert main([*command, files[1], "--invert"]) == 0
    inverted = capsys.readouterr()
    assert inverted.out.splitlines()[1:6] == plain.out.splitlines()[1:6]
    assert inverted.err == ""
    assert main([*command, files[0], "--invert"]) == 0
    assert "without --invert" in capsys.readouterr().err


def test_the_picture_of_guesses_shows_what_the_model_gets(tmp_path):
    file, pictures = tmp_path / "guesses.png", []
    for value in (0, 255):
        x = torch.full((1, 1, 8, 8), value, dtype=torch.uint8)
        plots.guesses([Image.new("L", (8, 8))], x, [[("a", 1.0)]], file)
        pictures.append(pixels_of(file) == 0)
    black, white = (picture.sum() for picture in pictures)
    assert black > 1.8 * white  # the input is as large as the image


def test_predict_names_what_it_cannot_read(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image, text = tmp_path / "image.png", tmp_path / "text.pt"
    Image.new("L", (8, 8)).save(image)
    text.write_text("no checkpoint")
    torch.save({"something": 1}, tmp_path / "other.pt")
    best = str(folder / "best.pt")
    assert "text.pt cannot be read" in error_of(capsys, "predict", str(text), str(image))
    assert "no checkpoint of a run" in error_of(capsys, "predict", "other.pt", str(image))
    assert "none.png cannot be read" in error_of(capsys, "predict", best, "none.png")
    for out, message in (("x.foo", "must end in ."), (str(folder), "which is a folder")):
        assert message in error_of(capsys, "predict", best, str(image), "--out", out)
    assert not (tmp_path / "predict.png").exists()


def test_dollar_signs_in_class_names(tmp_path):
    file = tmp_path / "names.png"
    x = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    plots.guesses([Image.new("L", (8, 8))], x, [[("a$_x^$", 0.75), ("$", 0.25)]], file)
    assert file.read_bytes().startswith(PNG)


def test_filters_are_convolutions():
    photo = torch.rand(20, 31)
    for name, got in filter_photo(photo).items():
        weight = PHOTO_FILTERS[name]
        expected = F.conv2d(photo[None, None], weight[None, None], padding="same")[0, 0]
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    weight = torch.stack(list(LAYER_FILTERS.values()))[:, None]
    before = F.conv2d(photo[None, None], weight)[0]
    stages = [before, before.relu(), F.max_pool2d(before.relu(), 2)]
    for got, expected in zip(activation_maps(photo).values(), stages, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_the_layers_filters_are_one_edge_in_four_ways():
    edge, negative, transpose, last = LAYER_FILTERS.values()
    assert edge.tolist() == [[-1, -1, 1, 1]] * 4
    assert torch.equal(negative, -edge)
    assert torch.equal(transpose, edge.T)
    assert torch.equal(last, -transpose)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_filters_draws_four_pictures(mode, tmp_path, capsys):
    Image.new(mode, (40, 30)).save(tmp_path / "photo.png")
    out = tmp_path / "out"
    assert main(["filters", str(tmp_path / "photo.png"), "--out", str(out)]) == 0
    printed = capsys.readouterr().out.split()
    assert sorted(printed) == sorted(str(file) for file in out.iterdir())
    assert len(printed) == 4
    assert all(file.read_bytes().startswith(PNG) for file in out.iterdir())


@pytest.mark.parametrize("size", [(128, 72), (72, 128), (300, 40)])
def test_no_text_of_the_filters_pictures_is_cut_off(size, tmp_path):
    Image.new("L", size).save(tmp_path / "photo.png")
    for file in draw(tmp_path / "photo.png", tmp_path / "out"):
        picture = pixels_of(file)
        for edge in (picture[0], picture[-1], picture[:, 0], picture[:, -1]):
            assert edge.min() == 255, file


@pytest.mark.parametrize("paper", [1.0, 200 / 255])
def test_maps_of_a_drawing_show_its_few_edges(paper, tmp_path):
    drawing = torch.full((280, 280), paper)
    drawing[40:240, 125:155] = 0  # edges are less than 1 % of the map
    edges = filter_photo(drawing)["Sobel x"]
    plots.maps({"Sobel x": edges}, tmp_path / "maps.png")
    assert len(np.unique(pixels_of(tmp_path / "maps.png"))) > 2  # black, grey and white
    assert plots._range([edges]) == (edges.min().item(), edges.max().item())
    flat = edges + 1e-7 * torch.rand(edges.shape)  # as rounding leaves it
    assert plots._range([flat]) == (flat.min().item(), flat.max().item())


def test_range_keeps_both_signs_where_one_is_rare():
    values = torch.zeros(1000)
    values[:5], values[5:25] = -2, 3
    assert plots._range([values]) == (-2, 3)


def test_filters_need_a_photo_of_their_size(tmp_path, capsys):
    for size, code in ((4, 2), (5, 0)):
        Image.new("L", (9, size)).save(tmp_path / "photo.png")
        command = ["filters", str(tmp_path / "photo.png"), "--out", str(tmp_path / f"{size}")]
        assert main(command) == code
        if code:
            assert "must have at least 5 x 5 pixels, has 4 x 9" in capsys.readouterr().err


def test_filters_writes_nothing_for_a_missing_photo(tmp_path, capsys):
    out = tmp_path / "out"
    message = error_of(capsys, "filters", str(tmp_path / "none.jpg"), "--out", str(out))
    assert "none.jpg cannot be read" in message
    assert not out.exists()


def test_taking_turns_changes_no_number():
    module = recipes.get("digits")
    configs = [module.Config(epochs=2, batch_size=64, layers=name) for name in ("native", "fused")]
    cpu = torch.device("cpu")
    sides = [Side(module, config, module.load_data(config, None), cpu) for config in configs]
    for _ in range(2):
        take_turns(sides)
        for side in sides:
            side.finish_epoch()
    for config, side in zip(configs, sides, strict=True):
        alone = Trainer(module, config, module.load_data(config, None), cpu)
        losses = []
        for _ in range(2):
            alone.train_epoch()
            losses += alone.finish_epoch()[1]
        assert side.losses == losses
        assert [len(turns) for turns in side.seconds] == [3, 3, 0]  # 23 steps, 10 in a turn


def test_native_layers_are_compared_at_their_fastest(monkeypatch):
    for flag in ("deterministic", "benchmark"):  # to be put back
        monkeypatch.setattr(torch.backends.cudnn, flag, False)
    module, cpu = recipes.get("digits"), torch.device("cpu")
    config = module.Config(layers="native")

    def choice_of(kind):
        kind(module, config, module.load_data(config, None), cpu)
        return torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark

    assert choice_of(Side) == (False, True)
    assert choice_of(Trainer) == (True, False)  # repeatable


def test_one_thread_is_timed_by_its_processor_time(monkeypatch):
    cpu = torch.device("cpu")
    for threads, name in ((1, "processor"), (2, "wall")):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert clock_name(cpu) == name
    assert clock_name(torch.device("cuda")) == "wall"


def test_compare_trains_all_epochs_in_one_process(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="compare takes no patience"):
        compare("digits", tmp_path, patience=2)
    for name, value in {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="compare runs in one process: start it without torchrun"):
        compare("digits", tmp_path)


def test_compare_tells_keeps_and_draws(tmp_path, capsys):
    out = tmp_path / "out"
    command = ["compare", "digits", "--seeds", "2", "--epochs", "1", "--batch-size", "256"]
    command += ["--device", "cpu", "--out", str(out)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    result = json.loads((out / "compare.json").read_text())
    assert [row["seed"] for row in result["seeds"]] == [0, 1]
    for row in result["seeds"]:
        assert row["native"]["test_accuracy"] == pytest.approx(
            row["fused"]["test_accuracy"], abs=0.01
        )
    seconds = [[row[side]["seconds"] for row in result["seeds"]] for side in ("native", "fused")]
    mean = sum(native / fused for native, fused in zip(*seconds, strict=True)) / 2
    assert f"training: native takes {mean:.2f} ±" in printed
    assert (out / "compare.png").read_bytes().startswith(PNG)
    assert "already holds a comparison" in error_of(capsys, *command)
    assert "--seeds must be at least 1" in error_of(capsys, "compare", "digits", "--seeds", "0")
