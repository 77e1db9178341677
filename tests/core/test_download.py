"""Downloads against a fake Hugging Face that serves a folder: planned, resumed, verified, and never unasked."""

import errno
import hashlib
import sys
from collections import namedtuple
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from ernie_pack.ernie_core.errors import CheckpointError, ErnieError, Interrupted
from ernie_pack.ernie_core.weights import download as module
from ernie_pack.ernie_core.weights.checkpoint import read_component, save_folder_component
from ernie_pack.ernie_core.weights.download import (
    REPOSITORIES,
    SINGLE_FILES,
    download,
    find_or_download,
    plan_download,
    plan_single_files,
)
from tiny_components import assert_same_weights, make_component

CHUNK = 20_000
KINDS = ("transformer", "vae")


class HTTPError(Exception):
    """As httpx's: not an OSError."""

    def __init__(self, message="", status=None):
        super().__init__(message)
        self.response = SimpleNamespace(status_code=status)


class RepositoryNotFoundError(HTTPError):
    pass


class GatedRepoError(RepositoryNotFoundError):
    pass


class LocalEntryNotFoundError(FileNotFoundError):
    pass


class Bar:
    """What huggingface_hub's progress bar is to a subclass."""

    def __init__(self, *, total, initial, disable=False):
        assert disable
        self.total = total

    def update(self, n=1):
        return None


class FakeHub:
    """Serves the files below `root`; fails as told."""

    def __init__(self, root: Path):
        self.root = root
        self.requested: list[str] = []
        self.failure: Exception | None = None
        self.damaged: set[str] = set()
        self.served_bytes = 0

    def model_info(self, repo_id, *, files_metadata):
        if self.failure:
            raise self.failure
        assert files_metadata
        paths = sorted(p for p in self.root.rglob("*") if p.is_file())
        return SimpleNamespace(sha="c0ffee", siblings=[self._sibling(path) for path in paths])

    def _sibling(self, path):
        data = path.read_bytes()
        large = path.suffix == ".safetensors"
        return SimpleNamespace(
            rfilename=path.relative_to(self.root).as_posix(),
            size=len(data),
            lfs={"sha256": hashlib.sha256(data).hexdigest()} if large else None,
            blob_id=hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(),
        )

    def hf_hub_download(self, repo_id, filename, *, revision, local_dir, tqdm_class=None):
        assert revision == "c0ffee"
        if self.failure:
            raise self.failure
        self.requested.append(filename)
        data = (self.root / filename).read_bytes()
        if filename in self.damaged:
            data = b"\xff" + data[1:]
        part = Path(local_dir) / ".cache/huggingface/download" / (filename.replace("/", "_") + ".incomplete")
        part.parent.mkdir(parents=True, exist_ok=True)
        start = part.stat().st_size if part.exists() else 0
        bar = tqdm_class(total=len(data), initial=start) if tqdm_class else Bar(total=0, initial=0, disable=True)
        with part.open("ab") as file:
            for at in range(start, len(data), CHUNK):
                piece = data[at : at + CHUNK]
                file.write(piece)
                file.flush()
                self.served_bytes += len(piece)
                bar.update(len(piece))
        target = Path(local_dir) / filename
        target.parent.mkdir(parents=True, exist_ok=True)
        part.replace(target)


@pytest.fixture
def remote(tmp_path):
    root = tmp_path / "remote"
    for kind in KINDS:
        save_folder_component(make_component(kind), root)
    for name in ("model_index.json", "README.md", "transformer/notes.md", "transformer/old.bin", "pe/config.json"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("{}")
    return root


@pytest.fixture
def hub(remote, monkeypatch):
    fake = FakeHub(remote)
    package, errors = ModuleType("huggingface_hub"), ModuleType("huggingface_hub.errors")
    errors.HTTPError = HTTPError
    package.errors = errors
    package.utils = SimpleNamespace(tqdm=Bar)
    package.HfApi = lambda: fake
    package.hf_hub_download = fake.hf_hub_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", package)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)
    return fake


def test_a_plan_names_what_is_needed_and_no_more(hub, remote):
    plan = plan_download(REPOSITORIES[0], KINDS)
    assert [file.path for file in plan.files] == [
        "model_index.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    assert plan.total_bytes == sum((remote / file.path).stat().st_size for file in plan.files)
    assert plan.revision == "c0ffee"
    assert plan.describe() == f"5 files, {plan.total_bytes / 1e6:.2f} MB, from baidu/ERNIE-Image"


def test_nothing_is_downloaded_unless_confirmed(hub, tmp_path):
    plan = plan_download(REPOSITORIES[0], KINDS)
    with pytest.raises(ErnieError, match=r"nothing is downloaded unless asked for: 5 files.*would go to"):
        download(plan, tmp_path / "to", confirm=False)
    assert not hub.requested
    assert not (tmp_path / "to").exists()


def test_a_downloaded_folder_reads_back_and_is_not_fetched_twice(hub, tmp_path):
    plan = plan_download(REPOSITORIES[0], KINDS)
    assert download(plan, tmp_path / "to", confirm=True) == tmp_path / "to"
    for kind in KINDS:
        assert_same_weights(read_component(tmp_path / "to", kind).state_dict, make_component(kind).state_dict)
    hub.requested.clear()
    download(plan, tmp_path / "to", confirm=True)
    assert hub.requested == []


def test_an_interrupted_download_goes_on_where_it_stopped(hub, tmp_path):
    plan = plan_download(REPOSITORIES[0], KINDS)
    seen = []

    def stop_in_the_transformer(done, total, path):
        seen.append(done)
        if path.endswith(".safetensors") and len(seen) > 4:
            raise Interrupted

    with pytest.raises(Interrupted):
        download(plan, tmp_path / "to", confirm=True, on_progress=stop_in_the_transformer)
    assert not (tmp_path / "to/transformer/diffusion_pytorch_model.safetensors").exists()
    reports = []
    download(plan, tmp_path / "to", confirm=True, on_progress=lambda *report: reports.append(report))
    assert hub.served_bytes == plan.total_bytes
    done = [report[0] for report in reports]
    assert done == sorted(done)
    assert reports[-1] == (plan.total_bytes, plan.total_bytes, "vae/diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("name", ["vae/diffusion_pytorch_model.safetensors", "vae/config.json"])
def test_a_damaged_file_is_removed_and_named(hub, tmp_path, name):
    hub.damaged.add(name)
    plan = plan_download(REPOSITORIES[0], KINDS)
    with pytest.raises(CheckpointError, match=rf"{name} from baidu/ERNIE-Image arrived damaged .* was removed"):
        download(plan, tmp_path / "to", confirm=True)
    assert not (tmp_path / "to" / name).exists()
    hub.damaged.clear()
    hub.requested.clear()
    download(plan, tmp_path / "to", confirm=True)
    assert hub.requested[0] == name


def test_a_changed_file_is_fetched_again(hub, tmp_path):
    plan = plan_download(REPOSITORIES[0], KINDS)
    download(plan, tmp_path / "to", confirm=True)
    (tmp_path / "to/vae/config.json").write_text("spoilt")
    hub.requested.clear()
    download(plan, tmp_path / "to", confirm=True)
    assert hub.requested == ["vae/config.json"]


def test_a_small_disk_is_noticed_before_anything_is_fetched(hub, tmp_path, monkeypatch):
    plan = plan_download(REPOSITORIES[0], KINDS)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage(0, 0, 1000))
    with pytest.raises(ErnieError, match=r"the download needs .* MB in .*, but only 0\.00 MB are free"):
        download(plan, tmp_path / "to", confirm=True)
    assert not hub.requested


def test_a_disk_that_fills_up_says_so(hub, tmp_path):
    plan = plan_download(REPOSITORIES[0], KINDS)
    hub.failure = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(ErnieError, match=r"the disk became full while model_index\.json"):
        download(plan, tmp_path / "to", confirm=True)


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (ConnectionError("Name or service not known"), r"no connection to Hugging Face.*goes on where it stopped"),
        (LocalEntryNotFoundError("cannot find the file online"), "no connection to Hugging Face"),
        (HTTPError("connect timeout"), "no connection to Hugging Face"),
        (HTTPError("bad token", 401), r"does not accept the access token for .* \(401\); log in with `hf auth login`"),
        (RepositoryNotFoundError("404 Client Error", 404), "Hugging Face has no baidu/ERNIE-Image"),
        (RepositoryNotFoundError("401 Client Error", 401), "or it is private"),
        (GatedRepoError("gated", 403), "refuses access to baidu/ERNIE-Image: accept its terms"),
        (HTTPError("sorry", 503), "Hugging Face answered 503"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_failures_are_told_in_plain_words(hub, tmp_path, failure, message):
    plan = plan_download(REPOSITORIES[0], KINDS)
    hub.failure = failure
    with pytest.raises(ErnieError, match=message):
        plan_download(REPOSITORIES[0], KINDS)
    with pytest.raises(ErnieError, match=message):
        download(plan, tmp_path / "to", confirm=True)


def test_a_repository_without_the_network_asked_for(hub):
    with pytest.raises(CheckpointError, match=r"has no weights in text_encoder/; choose one of baidu/ERNIE-Image"):
        plan_download("someone/else", ["text_encoder"])


def test_the_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ErnieError, match="needs the package huggingface_hub; pip install huggingface_hub"):
        plan_download(REPOSITORIES[0])


def test_a_complete_folder_is_found_without_the_network(hub, tmp_path):
    hub.failure = AssertionError("the network was asked")
    with pytest.raises(ErnieError, match=r"is not complete in .*: transformer, vae missing.*about 16\.2 GB"):
        find_or_download(REPOSITORIES[0], tmp_path, kinds=KINDS, confirm=False)
    hub.failure = None
    folder = find_or_download(REPOSITORIES[0], tmp_path, kinds=KINDS, confirm=True)
    assert folder == tmp_path / "ERNIE-Image"
    hub.failure = AssertionError("the network was asked")
    assert find_or_download(REPOSITORIES[0], tmp_path, kinds=KINDS, confirm=False) == folder
    (folder / "vae/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ErnieError, match="vae missing"):
        find_or_download(REPOSITORIES[0], tmp_path, kinds=KINDS, confirm=False)


def test_single_files_are_planned_by_their_paths(hub, remote):
    path = "vae/flux2-vae.safetensors"
    (remote / path).write_bytes(b"1234")
    (file,) = plan_single_files([path]).files
    assert (file.path, file.size) == (path, 4)
    with pytest.raises(CheckpointError, match=r"no longer has diffusion_models/ernie-image\.safetensors"):
        plan_single_files([path, "diffusion_models/ernie-image.safetensors"])
    with pytest.raises(ErnieError, match=r"expected some of diffusion_models.*, got unet/x"):
        plan_single_files(["unet/x"])
    assert set(SINGLE_FILES.values()) == {"transformer", "text_encoder", "enhancer", "vae"}
