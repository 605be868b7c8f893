import sys

import pytest

from diffsynth import _discovery, registry
from diffsynth._discovery import Catalog, Declared, Problem
from diffsynth.errors import UnknownModel
from diffsynth.spec import ModelSpec


def declared(name, hub_id=None):
    spec = ModelSpec(
        name=name,
        hub_id=hub_id,
        family="toy",
        task="text-to-image",
        pipeline="toy.pipeline:Toy",
        components={"dit": f"Owner/{name}:dit.safetensors", "vae": f"Owner/{name}:vae.safetensors"},
        processors={"tokenizer": f"Owner/{name}:tokenizer/"},
        defaults={"num_inference_steps": 8},
    )
    return Declared(spec, "toy", "diffsynth-toy", "1.2")


@pytest.fixture
def catalog(monkeypatch, tmp_path):
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path))
    models = (declared("b-model", "Owner/B-Model"), declared("a-model"), declared("other"))
    fake = _discovery._Discovered(Catalog(models=models), manager=None)
    monkeypatch.setattr(_discovery, "_discovered", fake)
    return tmp_path


def test_list_is_sorted_and_takes_a_glob(catalog):
    assert [record.name for record in registry.list()] == ["a-model", "b-model", "other"]
    assert [record.name for record in registry.list("*-MODEL")] == ["a-model", "b-model"]
    assert [record.name for record in registry.list("owner/*")] == ["b-model"]
    assert registry.list("model") == []


@pytest.mark.parametrize("name", ["b-model", "B-MODEL", "Owner/B-Model", "owner/b-model", "toy:b-model", " b-model "])
def test_get_ignores_case_and_takes_hub_ids(catalog, name):
    assert registry.get(name).hub_id == "Owner/B-Model"


def test_a_record_as_plain_values(catalog):
    record = registry.get("a-model").to_dict()
    assert record["components"] == {"dit": "Owner/a-model:dit.safetensors", "vae": "Owner/a-model:vae.safetensors"}
    assert record["defaults"] == {"num_inference_steps": 8}
    assert (record["plugin"], record["distribution"], record["version"]) == ("toy", "diffsynth-toy", "1.2")
    assert record["weights"] == "absent"


def test_weights_are_told_by_names(catalog):
    folder = catalog / "Owner" / "a-model"
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer" / "tokenizer.json").touch()
    (folder / "dit.safetensors").touch()
    assert registry.get("a-model").weights == "partial"
    (folder / "vae.safetensors").touch()
    assert registry.get("a-model").weights == "present"


def test_an_unknown_name_has_the_nearest_and_the_broken(catalog, monkeypatch):
    with pytest.raises(UnknownModel, match=r"^'a-modl' is not installed; did you mean 'a-model'\?$"):
        registry.get("a-modl")
    with pytest.raises(UnknownModel, match=r"^'zzz' is not installed\. Run: diffsynth list$"):
        registry.get("zzz")
    broken = Problem("flux", "diffsynth-flux", "0.3.1", "No module named 'x'")
    fake = _discovery._Discovered(Catalog(problems=(broken,)), manager=None)
    monkeypatch.setattr(_discovery, "_discovered", fake)
    with pytest.raises(UnknownModel) as caught:
        registry.get("flux.1-dev")
    assert "1 plugin is broken: flux (diffsynth-flux 0.3.1): No module named 'x'. Run: diffsynth plugins" in str(
        caught.value
    )


def test_the_facade_defines_nothing():
    source = sys.modules["diffsynth.registry"]
    assert sorted(source.__all__) == source.__all__
    assert source.list is not list
    assert source.list.__module__ == "diffsynth._models"
