"""Bad input gives one clear sentence, before anything is written; good input means what it says."""

import ast

import pytest
import yaml

from dlr.base.identity import resolved
from dlr.runs import project_root
from dlr.settings import LocalPath, SettingsError, effective, from_text, read_params, validated
from dlr.train.settings import RunConfig
from dlr.workbook.phases import PHASES, PhaseSettings, phase
from dlr.workbook.phases.evaluation import EvaluationConfig
from dlr.workbook.phases.training import TokenConfig
from dlr.workbook.runner import checked_parameters, notebook_settings
from dlr.workbook.sweeps import expand

PARAMS = sorted(path for path in project_root().glob("params/*/*.yaml") if path.parent.name != "models")


@pytest.fixture(autouse=True)
def _no_preset(monkeypatch):
    monkeypatch.delenv("DLR_PRESET", raising=False)


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
    ({"lr": "fast"}, "lr='fast'"),
    ({"target_skip": 1.2}, "target_skip=1.2"),
    ({"target_skip": -0.1}, "target_skip=-0.1"),
    ({"steps": 0}, "steps=0"),
    ({"steps": 2.5}, "steps=2.5"),
    ({"always_keep": 0}, "always_keep=0"),
    ({"level": "word"}, "level='word'"),
    ({"level": "sequence"}, "set warm_start=false"),
    ({"dataset": False},
     "dataset=False: input should be a valid string (YAML reads it as bool: put it in quotes)"),
])
def test_wrong_settings_are_named_with_the_remedy(given, words):
    with pytest.raises(SettingsError) as error:
        validated(given, RunConfig)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("phase, assignment, words", [
    ("baselines", "dropped=[0.2,1.5]", "dropped.1=1.5"),
    ("sequence_routing", "penalties=[1.0,1]", "one value twice"),
    ("baselines", "dropped=[0.201,0.204]", "one value twice (20%)"),
    ("token_routing", "variants=[DLR, DLR]", "twice (DLR)"),
    ("latency", "lengths=[16,16]", "one value twice"),
    ("token_analysis", "budgets=[0.4,4e-1]", "one value twice"),
    ("token_routing", "steps=10:00", "steps='10:00'"), ("token_routing", "lr=1:30", "lr='1:30'"),
    ("token_routing", "lr=1e400", "finite number"),
    ("token_routing", "keep_bias=-1e999", "finite number"),
    ("token_routing", "seed=-1", "seed=-1"),
    ("token_routing", "dataset=", "dataset=''"),
    ("pareto", "model=", "model=''"),
    ("latency", "skips=[]", "at least 1 item"), ("latency", "batches=[]", "at least 1 item"),
    ("latency", "skip_adapter_rank=-1", "skip_adapter_rank=-1"),
    ("latency", "lengths=[0]", "lengths.0=0"), ("token_analysis", "budgets=[]", "at least 1 item"),
    ("token_analysis", "weights=[]", "at least 1 item"),
    ("evaluation", "tasks=blimp", "write [a, b]"),
    ("token_routing", "run_name=../x", "run_name='../x'"),
    ("token_routing", "run_name=..", "run_name='..'"),
    ("token_routing", "run_name=.", "run_name='.'"),
    ("token_routing", "run_name=.hidden", "run_name='.hidden'"),
    ("token_routin", "steps=1", "did you mean 'token_routing'"),
    ("pareto", "targt=1", "unknown setting 'targt'"),
    ("pareto", "target_skip", "name=value"),
    ("token_routing", "steps=[1", "steps='[1' cannot be read"),
    ("token_routing", "seed=2024-13-45", "cannot be read"),
])
def test_what_no_notebook_takes_is_refused_before_a_kernel_starts(phase, assignment, words):
    with pytest.raises(SettingsError) as error:
        checked_parameters(phase, None, [assignment])
    assert words in str(error.value) and "\n" not in str(error.value)


def test_speed_is_measured_on_a_shape_or_on_a_model():
    assert checked_parameters("latency", None, ["model=smollm2"])["model"] == "smollm2"
    with pytest.raises(SettingsError, match="model='smollm2' has weights of its own"):
        checked_parameters("latency", None, ["model=smollm2", "shape=tinyllama-1.1b"])


@pytest.mark.parametrize("text", [
    "see issue #42, it is fixed", "12:30", "Note: this", "no", 'He said: "hi', "[x", "", "1e-4",
    "null", " spaced ", "a=b"
])
def test_a_text_setting_takes_the_text_as_it_is(text):
    assert checked_parameters("explorer", None, [f"text={text}"]) == {"text": text}


def test_other_settings_are_read_by_their_type():
    def read(phase, *assignments):
        return checked_parameters(phase, None, list(assignments))

    assert read("token_routing", "target_skip=0.3") == {"target_skip": 0.3}
    assert read("token_routing", "lr=1e-4", "steps=010", "keep_bias=-.5", "seed=1_000") == {
        "lr": 1e-4, "steps": 10, "keep_bias": -0.5, "seed": 1000}
    assert read("evaluation", "limit=None", "dtype=null") == {"limit": None, "dtype": None}
    given = read("token_routing", "bf16=null", "warm_start=no")
    assert given == {"bf16": None, "warm_start": False}
    given = read("token_routing", "variants=[DLR, best static]")
    assert given == {"variants": ["DLR", "best static"]}
    given = read("evaluation", "tasks=[no, 12:30, 1e3]", "limit=null")
    assert given == {"tasks": ["no", "12:30", "1e3"], "limit": None}
    assert validated(read("baselines", "dropped=[1e-1]"), PHASES["baselines"][1]).dropped == [0.1]
    assert from_text("target_skp", "[", TokenConfig) == "["         # the nearest name is what helps
    assert validated({"lr": "1e-4"}, RunConfig).lr == 1e-4       # papermill -f hands YAML's text on


def test_copies_are_validated():
    config = TokenConfig()
    assert config.changed(warm_start=False, level="sequence").level == "sequence"
    for changes, words in (({"warm_strat": False}, "did you mean 'warm_start'"),
                           ({"penalty": "x"}, "penalty='x'"),
                           ({"level": "sequence"}, "set warm_start=false")):
        with pytest.raises(SettingsError, match=words):
            config.changed(**changes)
    assert config == TokenConfig()


def test_a_phase_is_a_schema_that_registers_itself():
    stems = sorted(path.stem for path in project_root().glob("notebooks/[0-9]*.py"))
    assert [phase.notebook for phase in PHASES.values()] == stems

    @phase("99_idea")
    class IdeaConfig(PhaseSettings):
        steps: int = 3
    try:
        assert list(PHASES)[-1] == "idea"
        assert checked_parameters("idea", None, ["steps=4"]) == {"steps": 4}
        with pytest.raises(SettingsError, match="run_name='../x'"):
            checked_parameters("idea", None, ["run_name=../x"])
    finally:
        del PHASES["idea"]


def test_a_base_of_its_own_brings_its_own_rows():
    assert [row.name for row in EvaluationConfig().variants] == ["router", "static plan"]
    assert EvaluationConfig(model="org/base").variants == []
    assert EvaluationConfig(phase="pareto").variants == []


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="There are: .*tinyllama.yaml"):
        read_params(project_root() / "params" / "token_routing" / "nothing.yaml")
    for text, words in (("- 1\n", "not a list"), ("a: [1\n", "not valid YAML"),
                        ("a: 2024-13-45\n", "not valid YAML")):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(SettingsError, match=words):
            read_params(tmp_path / "bad.yaml")


# -- names in a notebook -------------------------------------------------------------------------
PARAMETERS = 'run_name: str = ""\ntarget_skip: float = 0.4\n'


def run_cells(*cells: str):
    """Settings as a kernel sees them after these cells: source in `In`, names in the namespace."""
    names = {"In": [""]}
    for cell in cells:
        names["In"].append(cell)
        exec(cell.replace("%", "#"), names)
    names.pop("__builtins__")
    names["In"].append('config = notebook_settings("token_routing", globals())')
    return notebook_settings("token_routing", names)


@pytest.mark.parametrize("cells", [
    [PARAMETERS + "target_skp = 0.3"],                                        # beside the right one
    [PARAMETERS, PARAMETERS + "target_skp: float = 0.3"],             # added after a good first run
    [PARAMETERS + "anything = 1"],                                          # like no setting at all
    [PARAMETERS, "# Parameters\nanything = 1\n"],                            # injected by papermill
    [PARAMETERS, "target_skp = 0.3"],                                       # in a cell of one's own
    ["label_tokns = 100"],
])
def test_a_name_meant_as_a_setting_is_refused_however_often_the_cell_runs(cells):
    for _ in range(2):
        with pytest.raises(SettingsError, match="unknown setting"):
            run_cells(*cells)
    with pytest.raises(SettingsError, match="did you mean 'target_skip'"):
        notebook_settings("token_routing", {"target_skp": 0.3})


@pytest.mark.parametrize("cells", [
    [PARAMETERS],
    ['my_note = "x"\nhelper = [1, 2]', PARAMETERS, "rows = []"],                # a user's own names
    [PARAMETERS + "target_skp = 0.3", PARAMETERS],                   # corrected, in the same kernel
    [PARAMETERS + "anything = 1", PARAMETERS],
    [PARAMETERS, "target_skp = 0.3", "target_skip = 0.3"],
    [PARAMETERS, "%matplotlib inline\nstep = len([1])"],                      # no literal: a result
    [PARAMETERS, "# Parameters\ntarget_skip = 0.3\n"],
])
def test_names_of_ones_own_and_corrected_ones_are_let_be(cells):
    assert isinstance(run_cells(*cells), TokenConfig)


def test_no_cell_of_a_notebook_takes_a_settings_name_for_something_else():
    for notebook, schema in PHASES.values():
        source = (project_root() / "notebooks" / f"{notebook}.py").read_text(encoding="utf-8")
        later = source.split('# %% tags=["parameters"]\n')[1].split("\n# %%", 1)[1]
        stored = {node.id for node in ast.walk(ast.parse(later)) if isinstance(node, ast.Name)
                  and isinstance(node.ctx, ast.Store)}
        assert not stored & schema.model_fields.keys(), notebook


def test_notebook_parameters_are_settings_and_their_values_the_defaults():
    for notebook, schema in PHASES.values():
        source = (project_root() / "notebooks" / f"{notebook}.py").read_text(encoding="utf-8")
        cell = source.split('# %% tags=["parameters"]\n')[1].split("\n# %%")[0]
        given = {node.target.id: ast.literal_eval(node.value) for node in ast.parse(cell).body}
        assert given and validated(given, schema) == schema(), notebook


# -- paths, sweeps -------------------------------------------------------------------------------
def test_a_relative_path_is_the_callers_then_the_projects(tmp_path, monkeypatch):
    (tmp_path / "texts").mkdir()
    monkeypatch.chdir(tmp_path)
    given = resolved({"dataset": "texts", "model": "nano"}, TokenConfig)
    assert given == {"dataset": str((tmp_path / "texts").resolve()), "model": "nano"}
    assert resolved({"model": "org/name"}, TokenConfig) == {"model": "org/name"}
    found = resolved({"work_dir": "new", "text_dir": "~"}, PHASES["base_model"][1])
    assert found["work_dir"] == str(tmp_path / "new") and not found["text_dir"].startswith("~")
    row = {"name": "a", "checkpoint": "dlr/nano/router", "order": "texts"}
    rows = resolved({"variants": [row]}, EvaluationConfig)
    assert rows["variants"][0]["checkpoint"] == str(project_root() / "dlr" / "nano" / "router")
    assert rows["variants"][0]["order"] == str(tmp_path / "texts")


def test_every_setting_that_names_files_is_marked():
    """A new one is then resolved, kept out of run.json and compared by content by itself."""
    row = EvaluationConfig.model_fields["variants"].annotation.__args__[0]
    for schema in [*(schema for _, schema in PHASES.values()), row]:
        for name, field in schema.model_fields.items():
            named = (name in ("model", "dataset", "checkpoint", "order")
                     or name.endswith(("_dir", "_test", "_validation")))
            marked = any(isinstance(mark, LocalPath) for mark in field.metadata)
            assert named == marked, (schema.__name__, name)


def test_sweeps_expand_and_refuse_what_no_notebook_takes():
    grid = [{"point": "router", "target_skip": [0.2, 0.4], "seed": [0, 1]}, {"point": "baselines"}]
    points = expand({"phase": "pareto", "common": {"steps": 9}, "grid": grid})
    assert len(points) == 5 and len({name for name, _ in points}) == 5
    assert all(p["steps"] == 9 for _, p in points)
    names = expand({"phase": "pareto", "grid": [{"model": ["/some/where", "org/name"]}]})
    assert [name for name, _ in names] == ["some-where", "org-name"]
    for collide in (["a/b", "a-b"], ["../x", "x"], ["A", "a"]):
        found = expand({"phase": "pareto", "grid": [{"model": collide}]})
        assert len({name.casefold() for name, _ in found}) == 2, found
        assert not any(name.startswith(".") or "/" in name for name, _ in found)
    assert len(expand({"phase": "pareto", "grid": {"seed": [1, 1]}})) == 1
    for sweep, words in (({"grid": [{"target": [0.2]}]}, "unknown setting 'target'"),
                         ({"girds": []}, "unknown: girds"), ({"grid": [1]}, "grid one"),
                         ({"grid": {"seed": 1}, "common": [1]}, "common is a mapping")):
        with pytest.raises(SettingsError, match=words):
            expand({"phase": "pareto"} | sweep)


def test_shipped_yaml_numbers_are_numbers():
    for path in PARAMS:
        for value in yaml.safe_load(path.read_text()).values():
            assert not (isinstance(value, str)
                        and value.replace(".", "").replace("e-", "").isdigit()), (path, value)


def test_the_toy_preset_replaces_defaults_and_bounds_what_was_chosen(monkeypatch):
    monkeypatch.setenv("DLR_PRESET", "toy")
    for schema in (schema for _, schema in PHASES.values()):
        assert effective({}, schema) == schema(**schema.toy)
    config = effective({"steps": 400, "seq_len": 48, "target_skip": 0.3}, TokenConfig)
    assert (config.steps, config.seq_len, config.target_skip) == (8, 48, 0.3)
    monkeypatch.setenv("DLR_PRESET", "tiny")
    with pytest.raises(SettingsError, match="there is 'toy'"):
        effective({}, TokenConfig)


def test_a_file_begins_with_what_it_is_like(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "base.yaml").write_text("model: gpt\nlr: 0.1\n")
    (tmp_path / "models" / "training.yaml").write_text("like: base.yaml\nsteps: 7\n")
    run, sweep = tmp_path / "run.yaml", tmp_path / "sweep.yaml"
    run.write_text("like: models/training.yaml\nlr: 0.2\n")
    assert read_params(run) == {"model": "gpt", "lr": 0.2, "steps": 7}
    sweep.write_text("phase: pareto\nlike: models/training.yaml\ncommon: {lr: 0.3}\ngrid: [{seed: [0, 1]}]\n")
    assert read_params(sweep)["common"] == {"model": "gpt", "lr": 0.3, "steps": 7}
    (tmp_path / "models" / "base.yaml").write_text("like: training.yaml\n")
    with pytest.raises(SettingsError, match="like it in turn"):
        read_params(run)
    (tmp_path / "models" / "base.yaml").write_text("model: gpt\nlr: 0.1\n")
    (tmp_path / "models" / "method.yaml").write_text("lr: 0.4\nseed: 1\n")
    run.write_text("like: [models/training.yaml, models/method.yaml]\nseed: 2\n")
    assert read_params(run) == {"model": "gpt", "lr": 0.4, "steps": 7, "seed": 2}, "the last file counts"
    for wrong in ("[1, b]", "[]", "{a: b}"):
        run.write_text(f"like: {wrong}\n")
        with pytest.raises(SettingsError, match="give a file or a list of files"):
            read_params(run)
    run.write_text("like: nothing.yaml\n")
    with pytest.raises(FileNotFoundError, match="nothing.yaml"):
        read_params(run)
    with pytest.raises(SettingsError, match="unknown setting 'like'"):
        notebook_settings("pareto", {"model": "nano", "like": "x", "In": ["model: str = 'nano'", "# Parameters\nlike = 'x'"]})
