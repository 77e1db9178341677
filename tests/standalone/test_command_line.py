"""The command line: exit codes, pictures with their workflow inside, core nodes."""

import importlib
import json
import os
import signal

import pytest
import torch
from ernie_pack.ernie_core.errors import ErnieError, Interrupted
from ernie_pack.ernie_core.sampling.schedule import make_sigmas
from ernie_pack.standalone import cli, host, load_pack
from ernie_pack.standalone.comfy_api import io
from ernie_pack.standalone.graph import parse_workflow, read_workflow
from ernie_pack.standalone.schedules import core_sigmas
from graph_nodes import CLASSES, api_graph, page_graph
from PIL import Image


@pytest.fixture
def core():
    load_pack()
    return importlib.import_module("ernie_pack.standalone.core_nodes")


class Grey(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Grey",
            inputs=[io.Float.Input("level", default=0.5), io.Int.Input("count", default=1)],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, level, count):
        return io.NodeOutput(torch.full((count, 16, 24, 3), level))


class Stops(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(node_id="Stops", is_output_node=True)

    @classmethod
    def execute(cls):
        raise Interrupted


@pytest.fixture
def run(core, tmp_path, monkeypatch):
    """Write a graph to a file and run it; returns the exit code."""
    classes = CLASSES | {
        "Grey": Grey,
        "Stops": Stops,
        "SaveImage": core.SaveImage,
        "PreviewImage": core.PreviewImage,
    }
    monkeypatch.setattr(cli, "load_node_classes", lambda: classes)
    monkeypatch.setattr(host, "session", host.Session())
    monkeypatch.delenv("ERNIE_MODELS", raising=False)

    def start(graph, *options):
        file = tmp_path / "graph.json"
        file.write_text(json.dumps(graph), "utf-8")
        return cli.main([str(file), "--out", str(tmp_path / "out"), *options])

    return start


def picture_page(prefix="ernie"):
    return {
        "nodes": [
            {
                "id": 1,
                "type": "Grey",
                "inputs": [],
                "outputs": [{"type": "IMAGE", "links": [1]}],
                "widgets_values": [0.5, 2],
            },
            {
                "id": 2,
                "type": "SaveImage",
                "inputs": [{"name": "images", "type": "IMAGE", "link": 1}],
                "widgets_values": [prefix],
            },
        ],
        "links": [[1, 1, 0, 2, 0, "IMAGE"]],
    }


def test_done_is_0_and_text_goes_to_stdout(run, capsys):
    assert run(page_graph(), "--set", "b=1") == cli.EXIT_DONE == 0
    assert "[3] 3=8" in capsys.readouterr().out


def test_a_failing_node_is_1(run, capsys):
    graph = {
        "1": {"class_type": "Fails", "inputs": {}},
        "2": {"class_type": "Show", "inputs": {"value": ["1", 0]}},
    }
    assert run(graph) == cli.EXIT_FAILED == 1
    assert "node 1 (Fails) failed: on purpose" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--set", "seed=-5"], ["--set", "seed"], ["--models", "/nowhere"]])
def test_refusals_are_2(run, options):
    assert run(api_graph(), *options) == cli.EXIT_REFUSED == 2


def test_no_workflow_is_2():
    with pytest.raises(SystemExit, match="2"):
        cli.main([])


def test_an_interrupt_is_130_and_keeps_what_was_saved(run, tmp_path, capsys):
    graph = {
        "1": {"class_type": "Grey", "inputs": {"level": 1.0, "count": 1}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "a"}},
        "3": {"class_type": "Stops", "inputs": {}},
    }
    assert run(graph) == cli.EXIT_INTERRUPTED == 130
    assert str(tmp_path / "out" / "a_00001_.png") in capsys.readouterr().out


def test_ctrl_c_stops_before_the_next_node(run, monkeypatch, capsys):
    class Presses(io.ComfyNode):
        @classmethod
        def define_schema(cls):
            return io.Schema(node_id="Presses", outputs=[io.Int.Output()])

        @classmethod
        def execute(cls):
            os.kill(os.getpid(), signal.SIGINT)
            return io.NodeOutput(1)

    classes = CLASSES | {"Presses": Presses}
    monkeypatch.setattr(cli, "load_node_classes", lambda: classes)
    graph = {
        "1": {"class_type": "Presses", "inputs": {}},
        "2": {"class_type": "Show", "inputs": {"value": ["1", 0]}},
    }
    assert run(graph) == cli.EXIT_INTERRUPTED
    captured = capsys.readouterr()
    assert "[2]" not in captured.out
    assert "what was finished is kept" in captured.err


def test_list_shows_what_set_can_change(run, capsys):
    assert run(api_graph(), "--list") == 0
    assert "2.sign='-'  COMBO  one of +, -" in capsys.readouterr().out


def test_pictures_carry_prompt_and_workflow_and_can_be_run_again(run, tmp_path):
    assert run(picture_page("sub/ernie"), "--set", "level=0.25") == 0
    files = sorted((tmp_path / "out" / "sub").iterdir())
    assert [f.name for f in files] == ["ernie_00001_.png", "ernie_00002_.png"]
    with Image.open(files[0]) as image:
        assert image.getpixel((0, 0)) == (63, 63, 63)
        assert json.loads(image.text["prompt"])["1"]["inputs"] == {"level": 0.25, "count": 2}
        assert json.loads(image.text["workflow"])["nodes"][0]["widgets_values"] == [0.25, 2]
    classes = cli.load_node_classes()
    again = read_workflow(files[0], classes)
    assert again.prompt["1"]["inputs"] == {"level": 0.25, "count": 2}


def test_a_relative_output_folder_works(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(picture_page(), "--out", "here") == 0
    assert (tmp_path / "here" / "ernie_00001_.png").is_file()


def test_pictures_are_never_overwritten(run, tmp_path):
    run(picture_page())
    run(picture_page())
    assert len(list((tmp_path / "out").iterdir())) == 4


def test_a_name_outside_the_output_folder_is_refused(run, tmp_path, capsys):
    assert run(picture_page("../evil")) == cli.EXIT_FAILED
    assert "inside the output folder expected" in capsys.readouterr().err
    assert not list(tmp_path.glob("evil*"))


def test_a_failed_write_leaves_no_half_file(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ErnieError, match=r"a\.png could not be written \(disk full\)\. Free some space"):
        host.save_png(torch.zeros(4, 4, 3), tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("steps", [8, 20, 50])
@pytest.mark.parametrize("shift", [1.0, 4.0])
def test_simple_scheduler_is_our_grid_where_the_steps_divide_1000(steps, shift):
    assert torch.allclose(core_sigmas("simple", steps, shift=shift), make_sigmas(steps, shift=shift), atol=1e-7)


@pytest.mark.parametrize("scheduler", ["simple", "normal"])
def test_schedules_descend_from_1_to_0_and_keep_their_length_under_denoise(scheduler):
    sigmas = core_sigmas(scheduler, 7, shift=4.0)
    assert sigmas[0] == 1
    assert sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()
    assert len(core_sigmas(scheduler, 7, shift=4.0, denoise=0.3)) == 8
    assert len(core_sigmas(scheduler, 7, shift=4.0, denoise=0.0)) == 0


def test_another_sampler_is_refused_with_what_there_is(core):
    answer = core.KSampler.validate_inputs("dpmpp_2m", "simple")
    assert answer.startswith("sampler_name euler expected without ComfyUI, got 'dpmpp_2m'")
    assert core.KSampler.validate_inputs("euler", "simple") is True


def test_noise_is_one_draw_of_the_whole_batch_and_batch_index_picks_single_draws():
    latent = {"samples": torch.zeros(3, 128, 2, 2)}
    expected = torch.randn(3, 128, 2, 2, generator=torch.Generator().manual_seed(5))
    assert torch.equal(host.prepare_noise(latent, 5), expected)
    picked = host.prepare_noise({"samples": torch.zeros(2, 128, 2, 2), "batch_index": [2, 0]}, 5)
    assert torch.equal(picked, expected[[2, 0]])


def test_every_core_node_describes_itself(core, monkeypatch):
    monkeypatch.setattr(host, "session", host.Session())
    ids = [cls.GET_SCHEMA().node_id for cls in core.NODES]
    assert ids == [cls.__name__ for cls in core.NODES]


def test_released_names_lead_to_the_official_folder_of_the_same_name(tmp_path, monkeypatch):
    for part in ("transformer", "text_encoder", "vae"):
        (tmp_path / "ERNIE-Image" / part).mkdir(parents=True)
    (tmp_path / "ERNIE-Image" / "model_index.json").write_text("{}", "utf-8")
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "mine.safetensors").touch()
    monkeypatch.setattr(host, "session", host.Session(models=tmp_path))
    assert host.list_models("diffusion_models") == ["ernie-image.safetensors", "ERNIE-Image/"]
    assert host.list_models("vae") == ["mine.safetensors", "flux2-vae.safetensors", "ERNIE-Image/"]
    assert host.model_path("diffusion_models", "ernie-image.safetensors") == tmp_path / "ERNIE-Image"
    assert host.model_path("vae", "mine.safetensors") == tmp_path / "vae" / "mine.safetensors"
    with pytest.raises(ErnieError, match=r"'other\.safetensors' expected in .*; there are: mine\.safetensors"):
        host.model_path("vae", "other.safetensors")


def test_a_mask_keeps_the_picture_outside_and_paints_inside():
    start = torch.rand(1, 128, 4, 4, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(start.shape, generator=torch.Generator().manual_seed(1))
    target = torch.full_like(start, 3.0)
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., 2:] = 1
    masked = host._masked(lambda x, sigma: (x - target) / sigma, mask, start, noise, None)
    x0 = noise - 1.0 * masked(noise, 1.0)
    assert torch.allclose(x0[..., :2], start[..., :2], atol=1e-5)
    assert torch.allclose(x0[..., 2:], target[..., 2:], atol=1e-5)


def test_stitched_pictures_share_their_height(core):
    first, second = torch.zeros(1, 8, 8, 3), torch.ones(1, 4, 4, 3)
    out = core.ImageStitch.execute(first, "right", True, 2, "red", second).args[0]
    assert out.shape == (1, 8, 18, 3)
    assert out[0, 0, 8].tolist() == [1.0, 0.0, 0.0]
    assert core.ImageStitch.execute(first, "down", False, 0, "white", second).args[0].shape == (1, 12, 8, 3)


def test_the_page_format_is_kept_for_pictures():
    assert parse_workflow(page_graph(), CLASSES).page == page_graph()
