"""Bad input gives one clear sentence, before anything runs or is written."""

import pytest
import yaml

from dlr.config import PHASES, RunConfig, SettingsError, TokenConfig, read_params, validated
from dlr.runs import project_root
from dlr.workbook import checked_parameters, expand, notebook_settings

PARAMS = sorted(project_root().glob("params/*/*.yaml"))


@pytest.mark.parametrize("path", PARAMS, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_every_shipped_file_loads_and_holds_differences_only(path):
    loaded = read_params(path)
    if "grid" in loaded:
        assert expand(loaded)
        return
    schema = PHASES[path.parent.name][1]
    validated(loaded, schema)
    same = [k for k, v in loaded.items() if k != "run_name" and schema.model_fields[k].default == v
            and path.stem != "original"]
    assert not same, f"equal to the defaults: {same}"


@pytest.mark.parametrize("given, words", [
    ({"target_skp": 0.3}, "unknown setting 'target_skp'; did you mean 'target_skip'"),
    ({"lr": "1e-4"}, "write 1.0e-4"),
    ({"target_skip": 1.2}, "target_skip=1.2"),
    ({"target_skip": -0.1}, "target_skip=-0.1"),
    ({"steps": 0}, "steps=0"),
    ({"steps": 2.5}, "steps=2.5"),
    ({"always_keep": 0}, "always_keep=0"),
    ({"level": "word"}, "level='word'"),
    ({"level": "sequence"}, "set warm_start=false"),
])
def test_wrong_settings_are_named_with_the_remedy(given, words):
    with pytest.raises(SettingsError) as error:
        validated(given)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_parameters_are_checked_before_a_kernel_starts():
    assert checked_parameters("token_routing", None, ["target_skip=0.3"]) == {"target_skip": 0.3}
    for arguments, words in ((("token_routin", None, []), "there are: base_model"),
                             (("pareto", None, ["targt=1"]), "unknown setting 'targt'"),
                             (("pareto", None, ["target_skip"]), "name=value"),
                             (("token_routing", None, ["lr=1e-4"]), "write 1.0e-4")):
        with pytest.raises(SettingsError, match=words.replace("(", r"\(")):
            checked_parameters(*arguments)


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="There are: .*tinyllama.yaml"):
        read_params(project_root() / "params" / "token_routing" / "nothing.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(SettingsError, match="not a list"):
        read_params(tmp_path / "list.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1\n")
    with pytest.raises(SettingsError, match="not valid YAML"):
        read_params(tmp_path / "bad.yaml")


def test_a_stray_name_in_a_notebook_is_refused_once(monkeypatch):
    monkeypatch.delenv("DLR_PRESET", raising=False)
    with pytest.raises(SettingsError, match="did you mean 'target_skip'"):
        notebook_settings("token_routing", {"target_skp": 0.3})
    names = {"target_skip": 0.3, "In": [], "_": 1}
    assert isinstance(notebook_settings("token_routing", names), TokenConfig)
    names["rows"] = []                                # made by later cells; running the cell again must not refuse it
    assert notebook_settings("token_routing", names).target_skip == 0.3


def test_sweeps_expand_and_refuse_what_no_notebook_takes():
    points = expand({"phase": "pareto", "common": {"steps": 9},
                     "grid": [{"point": "router", "target_skip": [0.2, 0.4], "seed": [0, 1]}, {"point": "baselines"}]})
    assert len(points) == 5 and len({name for name, _ in points}) == 5
    assert all(p["steps"] == 9 for _, p in points)
    names = expand({"phase": "pareto", "grid": [{"model": ["/some/where", "org/name"]}]})
    assert [name for name, _ in names] == ["some-where", "org-name"]
    with pytest.raises(SettingsError, match="run_name='../x'"):
        checked_parameters("pareto", None, ["run_name=../x"])
    with pytest.raises(SettingsError, match="unknown setting 'target'"):
        expand({"phase": "pareto", "grid": [{"target": [0.2]}]})
    with pytest.raises(SettingsError, match="unknown: girds"):
        expand({"phase": "pareto", "girds": []})


def test_notebook_parameters_are_settings_with_plain_literals():
    import ast
    for notebook, schema in PHASES.values():
        source = (project_root() / "notebooks" / f"{notebook}.py").read_text()
        cell = source.split('# %% tags=["parameters"]\n')[1].split("\n# %%")[0]
        for line in filter(None, cell.splitlines()):
            node = ast.parse(line).body[0]
            assert isinstance(node, ast.AnnAssign) and node.target.id in schema.model_fields, line
            assert ast.literal_eval(node.value) is not None


def test_shipped_yaml_numbers_are_numbers():
    for path in PARAMS:
        for value in yaml.safe_load(path.read_text()).values():
            assert not (isinstance(value, str) and value.replace(".", "").replace("e-", "").isdigit()), (path, value)


def test_defaults_are_valid():
    assert RunConfig().router().always_keep == 4
