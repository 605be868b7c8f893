import json
import time

import pytest

from diffsynth.core.loader import download
from diffsynth.core.loader.config import ModelConfig
from diffsynth.core.loader.files import checkpoint_at, find, missing_shards, weights_state
from diffsynth.core.loader.identity import file_identity
from diffsynth.errors import DownloadFailed, NoFiles


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Put a repository on disk, and block the network."""
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path))
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "true")
    folder = tmp_path / "owner" / "model" / "transformer"
    folder.mkdir(parents=True)
    for i in (2, 1, 3):
        (folder / f"part-{i:05d}-of-00003.safetensors").touch()
    (folder.parent / "tokenizer").mkdir()
    (folder.parent / "tokenizer" / "vocab.json").touch()
    return folder


def test_globs_are_sorted(hub):
    found = find(ModelConfig(model_id="owner/model", origin_file_pattern="transformer/*.safetensors"))
    assert [file.name[5:10] for file in found] == ["00001", "00002", "00003"]


def test_several_patterns(hub):
    found = find(
        ModelConfig(model_id="owner/model", origin_file_pattern=["transformer/part-*", "tokenizer/vocab.json"])
    )
    assert len(found) == 4


@pytest.mark.parametrize(("pattern", "folder"), [("tokenizer/", "tokenizer"), (None, ""), ("", ""), ("./", "")])
def test_folders(hub, pattern, folder):
    assert find(ModelConfig(model_id="owner/model", origin_file_pattern=pattern)) == [hub.parent / folder]


@pytest.mark.parametrize("suffix", [".incomplete", ".partial", ".lock"])
def test_a_partial_download_is_not_there(hub, suffix):
    (hub.parent / "vae").mkdir()
    (hub.parent / "vae" / f"x.safetensors{suffix}").write_bytes(b"half")
    with pytest.raises(NoFiles, match=r"no file matches 'vae/\*'"):
        find(ModelConfig(model_id="owner/model", origin_file_pattern="vae/*"))


def test_an_empty_glob_shows_what_is_there(hub):
    with pytest.raises(NoFiles, match=r"'vae/\*'.*owner/model.*DIFFSYNTH_SKIP_DOWNLOAD.*tokenizer/, transformer/"):
        find(ModelConfig(model_id="owner/model", origin_file_pattern="vae/*"))


def test_a_missing_path_shows_its_neighbours(hub):
    with pytest.raises(NoFiles, match=r"x\.safetensors does not exist.*part-00001"):
        find(ModelConfig(str(hub / "x.safetensors")))


def test_missing_shards_are_named_by_number(hub):
    (hub / "part-00002-of-00003.safetensors").unlink()
    with pytest.raises(NoFiles, match="1 shard is missing.*part-00002-of-00003"):
        find(ModelConfig(model_id="owner/model", origin_file_pattern="transformer/*.safetensors"))


def test_an_index_with_a_byte_order_mark(tmp_path):
    for name in ("m-a.safetensors", "m-b.safetensors"):
        (tmp_path / name).touch()
    index = {"weight_map": {"x": "m-a.safetensors", "y": "m-b.safetensors"}}
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8-sig")
    found = find(ModelConfig(tmp_path / "m.safetensors.index.json"))
    assert [file.name for file in found] == ["m-a.safetensors", "m-b.safetensors"]


def test_missing_shards_are_named_by_the_index(tmp_path):
    (tmp_path / "m-a.safetensors").touch()
    index = {"weight_map": {"x": "m-a.safetensors", "y": "m-b.safetensors"}}
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps(index))
    assert missing_shards([tmp_path / "m-a.safetensors"]) == [tmp_path / "m-b.safetensors"]
    with pytest.raises(NoFiles, match=r"1 of the 2 shards in .* missing: m-b\.safetensors"):
        find(ModelConfig(tmp_path / "m.safetensors.index.json"))


def write_index(folder, name, files):
    names = {str(number): file for number, file in enumerate(files)}
    (folder / f"{name}.index.json").write_text(json.dumps({"weight_map": names}))


SHARDS = [f"part-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]


class TestVariants:
    """An index or the user says which of several variants is meant, never the order of their names."""

    GLOB = ModelConfig(model_id="owner/model", origin_file_pattern="transformer/*.safetensors")

    @pytest.mark.parametrize(
        "extra", ["part.non_ema.safetensors", "aaa.safetensors", "part-00001-of-00002.safetensors"]
    )
    def test_an_index_rules(self, hub, caplog, extra):
        write_index(hub, "part.safetensors", SHARDS)
        (hub / extra).touch()
        assert [file.name for file in find(self.GLOB)] == SHARDS
        assert [file.name for file in checkpoint_at(hub)] == SHARDS
        assert f"not among the shards of part.safetensors.index.json, so not read: {extra}" in caplog.text

    def test_two_indices_are_a_question(self, hub):
        (hub / "x-00001-of-00001.safetensors").touch()
        write_index(hub, "part.safetensors", SHARDS)
        write_index(hub, "part.fp16.safetensors", ["x-00001-of-00001.safetensors"])
        with pytest.raises(NoFiles, match=r"holds 2 checkpoints: .*origin_file_pattern that matches no other"):
            find(self.GLOB)

    def test_without_an_index_variants_are_a_question(self, hub):
        for file in hub.iterdir():
            file.unlink()
        for name in ("model.safetensors", "model.fp16.safetensors", "model - backup.safetensors"):
            (hub / name).touch()
        with pytest.raises(NoFiles, match=r"holds 3 checkpoints: model - backup\.safetensors; model\.fp16"):
            find(self.GLOB)
        one = ModelConfig(model_id="owner/model", origin_file_pattern="transformer/model.safetensors")
        assert [file.name for file in find(one)] == ["model.safetensors"]

    def test_files_named_in_full_are_what_the_user_meant(self, hub):
        (hub / "extra.safetensors").touch()
        both = ["transformer/part-*.safetensors", "transformer/extra.safetensors"]
        assert len(find(ModelConfig(model_id="owner/model", origin_file_pattern=both))) == 4

    def test_a_list_of_paths_with_a_file_that_the_index_does_not_name(self, hub):
        write_index(hub, "part.safetensors", SHARDS)
        (hub / "part.non_ema.safetensors").touch()
        with pytest.raises(NoFiles, match=r"lists 3 of the files given, and not part\.non_ema\.safetensors"):
            find(ModelConfig([str(file) for file in hub.glob("*.safetensors")]))


def test_the_field_beats_the_environment(hub, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "owner" / "model").mkdir(parents=True)
    (elsewhere / "owner" / "model" / "x.safetensors").touch()
    config = ModelConfig(model_id="owner/model", origin_file_pattern="*.safetensors", local_model_path=elsewhere)
    assert find(config) == [elsewhere / "owner" / "model" / "x.safetensors"]
    assert ModelConfig("x", skip_download=False).offline is False
    assert ModelConfig("x").offline is True


def test_the_home_folder(hub, monkeypatch):
    """`~` in settings and quotes is not expanded by a shell: models were downloaded to a folder of this name."""
    monkeypatch.setenv("HOME", str(hub.parents[2]))
    pattern = "transformer/part-00001-of-00003.safetensors"
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", "~")
    assert ModelConfig(model_id="owner/model", origin_file_pattern=pattern).root == hub.parents[2]
    assert ModelConfig(model_id="owner/model", local_model_path="~/x").folder == hub.parents[2] / "x/owner/model"
    assert len(find(ModelConfig("~/owner/model/transformer"))) == len(find(ModelConfig(str(hub))))


def test_nothing_is_fetched_when_all_is_there(hub, monkeypatch):
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "false")
    monkeypatch.setattr(download, "download", None)
    assert len(find(ModelConfig(model_id="owner/model", origin_file_pattern="transformer/*"))) == 3


@pytest.mark.parametrize("hub_name", ["modelscope", "huggingface"])
def test_what_is_missing_is_fetched_from_the_chosen_hub(hub, monkeypatch, hub_name):
    asked = []

    def fetch(config, task):
        asked.append((config.model_id, download._globs(config.patterns)))
        (hub.parent / "vae").mkdir()
        (hub.parent / "vae" / "x.safetensors").touch()

    monkeypatch.setitem(download._FETCHERS, hub_name, fetch)
    config = ModelConfig(
        model_id="owner/model", origin_file_pattern="vae/", skip_download=False, download_source=hub_name
    )
    assert find(config) == [hub.parent / "vae"]
    assert asked == [("owner/model", ["vae/*"])]


@pytest.mark.parametrize("hub_name", ["modelscope", "huggingface"])
def test_no_network(hub, hub_name, monkeypatch):
    """The real hub libraries are called while the network is blocked."""
    other = {"modelscope": "huggingface", "huggingface": "modelscope"}[hub_name]

    def fetch(*arguments):
        raise ConnectionError("name resolution failed")

    monkeypatch.setitem(download._FETCHERS, hub_name, fetch)
    config = ModelConfig(
        model_id="owner/model", origin_file_pattern="vae/*", skip_download=False, download_source=hub_name
    )
    with pytest.raises(
        DownloadFailed, match=f"name resolution failed.*DIFFSYNTH_DOWNLOAD_SOURCE={other}.*put the files"
    ):
        find(config)


def test_package_sources():
    found = find(ModelConfig.from_source("package://diffsynth/py.typed"))
    assert found[0].name == "py.typed"
    with pytest.raises(NoFiles, match="does not exist"):
        find(ModelConfig.from_source("package://diffsynth/nothing.safetensors"))
    with pytest.raises(NoFiles, match="package 'no_such_package' is not installed"):
        find(ModelConfig.from_source("package://no_such_package/x"))


def test_other_schemes_ask_the_plugins(tmp_path):
    config = ModelConfig.from_source("s3://bucket/x.safetensors")
    assert find(config, resolve=lambda source: [tmp_path / source.rpartition("/")[2]]) == [tmp_path / "x.safetensors"]
    with pytest.raises(NoFiles, match="no installed plugin resolves the source"):
        find(config, resolve=lambda source: None)


def test_weights_state(hub, tmp_path):
    dit, vae = "owner/model:transformer/*.safetensors", "owner/model:vae/*"
    assert weights_state([dit], tmp_path) == "present"
    assert weights_state([dit, vae], tmp_path) == "partial"
    assert weights_state([vae], tmp_path) == "absent"
    assert weights_state(["package://diffsynth/py.typed"], tmp_path) == "present"
    (hub / "part-00002-of-00003.safetensors").unlink()
    assert weights_state([dit], tmp_path) == "partial"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "no source"),
        ({"path": "x", "model_id": "a/b"}, "path and model_id; expected one"),
        ({"path": "x", "download_source": "huggingfase"}, "did you mean 'huggingface'"),
        ({"path": "x", "quantize": {"metod": "fp8_row"}}, "quantize has 'metod'; did you mean 'method'"),
        ({"path": "x", "clear_parameters": True}, "clear_parameters"),
    ],
)
def test_bad_configs(fields, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**fields)


@pytest.mark.parametrize("value", ["maybe", "2"])
def test_a_value_that_does_not_parse_raises(monkeypatch, value):
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", value)
    with pytest.raises(ValueError, match=f"DIFFSYNTH_SKIP_DOWNLOAD='{value}': expected true or false"):
        _ = ModelConfig("x").offline


class TestIdentity:
    def test_it_follows_the_content(self, tmp_path, monkeypatch):
        monkeypatch.setenv("DIFFSYNTH_CACHE_DIR", str(tmp_path / "cache"))
        file, same = tmp_path / "a", tmp_path / "b"
        file.write_bytes(b"x" * 100)
        same.write_bytes(b"x" * 100)
        first = file_identity(file)
        assert first.startswith("sampled-sha256:")
        assert first == file_identity(same) == file_identity(file)
        file.write_bytes(b"y" * 100)
        assert file_identity(file) != first

    def test_a_corrupt_cache_is_no_obstacle(self, tmp_path, monkeypatch):
        monkeypatch.setenv("DIFFSYNTH_CACHE_DIR", str(tmp_path))
        (tmp_path / "identity.json").write_text("{broken")
        (tmp_path / "a").write_bytes(b"x")
        assert file_identity(tmp_path / "a").startswith("sampled-sha256:")

    def test_the_hubs_checksum_is_preferred(self, tmp_path, monkeypatch):
        monkeypatch.setenv("DIFFSYNTH_CACHE_DIR", str(tmp_path / "cache"))
        (tmp_path / "vae").mkdir()
        (tmp_path / "vae" / "x.safetensors").write_bytes(b"x")
        note = tmp_path / ".cache" / "huggingface" / "download" / "vae" / "x.safetensors.metadata"
        note.parent.mkdir(parents=True)
        note.write_text("commit\n" + "ab" * 32 + f"\n{time.time()}\n")
        assert file_identity(tmp_path / "vae" / "x.safetensors") == "sha256:" + "ab" * 32
        # Written again since the download: the hub's word is about another content.
        note.write_text("commit\n" + "ab" * 32 + "\n123.0\n")
        assert file_identity(tmp_path / "vae" / "x.safetensors").startswith("sampled-sha256:")
