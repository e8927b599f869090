"""The report: every number is what its file holds, nothing is fetched, what is missing is said."""

import functools
import html.parser
import json
import re
import shutil
import statistics

import pytest

from dlr.__main__ import main
from dlr.runs import project_root
from dlr.workbook.report import claims, commands, page, pictures, predecessor
from dlr.workbook.report.sources import PUBLISHED, Results
from dlr.workbook.report.tables import Table
from dlr.workbook.sweeps import points_of

ROOT = project_root()
RECORDED = ROOT / "results"
PIXEL = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def whole():
    """(the page of the recorded results, its tables); figures are drawn in the notebook's test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "png", lambda picture: PIXEL)
        return page.page(Results(RECORDED), bar=False)


# -- numbers --------------------------------------------------------------------------------------
class Reader(html.parser.HTMLParser):
    """A page's numbers with their origins, and the text that stands outside of them."""
    VOID = {"meta", "img", "br", "link", "input", "hr"}
    # names and signs, no statements: commands and files, formulas, titles of papers, days
    ASIDE = {"data", "code", "math", "cite", "time", "style", "title"}

    def __init__(self, text: str):
        super().__init__()
        self.open, self.numbers, self.loose = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "data":
            self.numbers.append(dict(attributes) | {"text": ""})

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, text):
        if "data" in self.open:
            self.numbers[-1]["text"] += text
        elif not self.ASIDE & set(self.open):
            self.loose.append(text)


MADE = {"value": lambda values: values[0], "mean": statistics.fmean, "least": min, "most": max,
        "SD": statistics.stdev, "count": len, "ratio": lambda values: values[0] / values[1],
        "mean ratio": lambda values: statistics.fmean(
            a / b for a, b in zip(values[::2], values[1::2])),
        "gap": lambda values: abs(values[1] - values[0]),
        "widest gap": lambda values: max(abs(a - b) for a, b in zip(values[::2], values[1::2])),
        "padded": lambda values: values[0] * (1 - values[2]) + values[1] * values[2]}


@functools.lru_cache
def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def recorded(root, file: str, steps: list):
    """What a file holds at a place, read apart from the code that wrote the page."""
    content = read((ROOT if file.startswith("dlr/") else root) / file)
    for step in steps:
        if isinstance(step, dict):
            content, = [row for row in content if step.items() <= row.items()]
        else:
            content = content[step]
    return content


def wrong(text: str, root=RECORDED) -> list:
    """What is printed and not recorded: numbers that differ, and numbers without an origin."""
    reader, errors = Reader(text), []
    for number in reader.numbers:
        values = [recorded(root, *place) for place in json.loads(number["data-from"])]
        value, times = MADE[number["data-how"]](values), float(number["data-times"])
        if value is None:
            value = "–"
        elif not isinstance(value, str):
            value = format(value * times if times != 1 else value, number["data-shape"])
        if value.replace("-", "−") != number["text"] and value != number["text"]:
            errors.append((number["text"], value, number["data-from"]))
    said = " ".join(reader.loose).replace("95 %", "")
    return errors + [word for word in said.split() if re.search(r"\d", word)
                     and not re.search(r"[^\W\d_]", word)]


def test_every_number_is_what_the_file_that_it_names_holds(whole):
    text = whole[0]
    assert wrong(text) == []
    numbers = Reader(text).numbers
    assert len(numbers) > 1000 and {number["data-how"] for number in numbers} >= {
        "value", "mean", "SD", "count", "ratio", "widest gap", "padded"}
    prose = [tag for tag in re.findall(r"<(?:p|li|figcaption)\b.*?</(?:p|li|figcaption)>", text,
                                       flags=re.DOTALL) if "<data" in tag]
    assert len(prose) > 40, "sentences hold numbers"


def test_a_wrong_number_and_one_without_an_origin_are_found(whole):
    text = str(whole[0])
    assert wrong(text.replace(">28.11</data>", ">28.12</data>", 1))[0][:2] == ("28.12", "28.11")
    assert wrong(text.replace("Must every token", "Must 17.3 of all tokens", 1)) == ["17.3"]


def test_sentences_turn_with_the_results(tmp_path):
    """The same claims, from results whose intervals lie on the other side."""
    file = "pareto/router-seed=0/metrics.json"
    for name in (file, "pareto/router-seed=0/run.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(RECORDED / name, tmp_path / name)
    before = claims.judged(Results(tmp_path))
    assert "the router is better than" in before[claims.HOLDS][0].striptags()
    content = json.loads((tmp_path / file).read_text())
    for row in content["against_static"]:
        row |= {"nll_difference": -row["nll_difference"], "low": -row["high"], "high": -row["low"]}
    (tmp_path / file).write_text(json.dumps(content))
    after = claims.judged(Results(tmp_path))
    assert not after[claims.HOLDS] and "is worse than" in after[claims.FAILS][0].striptags()


def test_what_was_lost_is_said(whole):
    """Sentences that a reader of the tables must not have to look for."""
    fails = " ".join(each.striptags() for each in claims.judged(Results(RECORDED))[claims.FAILS])
    for words in ("stories: the router is worse than the best static plan", "v2 skips 99.6 %",
                  "the stage “end to end” is worse than “healed”", "DLR 20 % is worse than best",
                  "decode: compact execution stays below the layer-count bound"):
        assert words in fails, words


# -- the page -------------------------------------------------------------------------------------
def test_nothing_is_fetched(whole):
    text = str(whole[0])
    assert "default-src 'none'" in text
    assert not re.search(r"https?:|@import|url\(|<script|<link|<iframe|srcset", text)
    sources = re.findall(r'<img src="(.*?)"', text)
    assert len(sources) >= 20 and all(each.startswith("data:image/png;base64,") for each in sources)
    targets, there = re.findall(r'href="#(.*?)"', text), set(re.findall(r' id="(.*?)"', text))
    assert targets and set(targets) <= there
    assert "/work/" not in text and "/root/" not in text and str(ROOT) not in text


def test_equations_are_well_formed(whole):
    assert str(whole[0]).count('<math display="block">') >= 8      # Reader asserts their nesting
    assert Reader(str(whole[0])).open == []


def test_what_is_missing_is_said_with_its_command(tmp_path):
    folder = tmp_path / "stages" / "default"
    shutil.copytree(RECORDED / "stages" / "default", folder)
    text, tables = page.page(Results(tmp_path), bar=False)
    assert wrong(text, tmp_path) == []
    plain = " ".join(text.striptags().split())
    for command in ("python -m dlr run latency", "python -m dlr sweep params/pareto/nano.yaml",
                    "python -m dlr run predecessor", "python -m dlr run depth_router"):
        assert command in plain, command
    assert {"stages-default", "setup", "commands", "predecessor-tinyllama"} <= {
        table.name for table in tables}


def test_a_picture_is_in_the_page_and_in_no_file():
    shown = {each.name: each for each in pictures.pictures(Results(RECORDED), "stages")}
    content = pictures.png(shown["stage_gains_default"])
    assert content.startswith(PIXEL)
    assert pictures.data_uri(PIXEL) == "data:image/png;base64,iVBORw0KGgo="


def test_the_predecessors_figures_have_ours_beside_them():
    results = Results(RECORDED)
    drawn = [picture for phase in ("pareto", "latency", "sequence_routing") for picture in pictures.pictures(results, phase)]
    beside = {file: ours for file, _, ours in pictures.replaced(drawn)}
    assert len(beside) == 17
    assert "pareto" in beside["pareto_frontier_curve"] and "latency_nano" in beside["inference_speedup_bar"]
    assert beside["all_experiments_val_loss"] == []                      # its runs are not among these


# -- tables for LaTeX -----------------------------------------------------------------------------
def test_tables_are_latex_with_every_text_escaped(whole):
    names = [table.name for table in whole[1]]
    assert len(names) == len(set(names)) > 20
    for table in whole[1]:
        text = page.latex(table)
        assert text.isascii(), [sign for sign in text if not sign.isascii()]
        body = text.split(r"\toprule")[1].split(r"\bottomrule")[0]
        lines = [line for line in body.split(r"\\") if line.replace(r"\midrule", "").strip()]
        assert len(lines) == len(table.rows) + 1
        for line in lines:
            assert len(re.findall(r"(?<!\\)&", line)) == len(table.columns) - 1, line
        assert not re.search(r"(?<!\\)[%_#]", body), table.name
        assert len(re.findall(r"(?<!\\)\$", text)) % 2 == 0
    hard = Table("hard", "50 % of a_b", ["a&b", "c"], [["<x> & #1", "~{y}\\^"]], [])
    assert r"<x> \& \#1 & \textasciitilde{}\{y\}\textbackslash{}\textasciicircum{} \\" in page.latex(hard)


# -- beside the predecessor -----------------------------------------------------------------------
def test_ratios_of_the_predecessor_are_those_of_its_own_rows():
    results = Results(RECORDED)
    smol, tiny = (predecessor.published(results, model).rows for model in predecessor.MODELS)
    assert str(smol[-1][7]) == "3.13" == f"{62.87 / 20.09:.2f}"
    long = next(row for row in tiny if [str(cell) for cell in row[:3]] == ["token DLR 30", "42", "500"])
    assert str(long[7]) == "1.43" == f"{15.22 / 10.67:.2f}"
    facts = " ".join(fact.striptags() for fact in predecessor.facts(results))
    assert "at one weight throughout it is 21.70 ± 0.38, at skip 0.208" in facts


def test_our_rows_stand_beside_it_once_they_are_there(tmp_path):
    """A run a point, as its sweep makes them; the ratio is to the dense row of the same seed."""
    rows = {"base": {"kind": "base", "seed": 0, "skip": 0.0, "perplexity_batches": 40.0},
            "dense LoRA": {"kind": "dense", "seed": 42, "skip": 0.0, "perplexity_batches": 32.0},
            "dense LoRA ": {"kind": "dense", "seed": 43, "skip": 0.0, "perplexity_batches": 30.0},
            "DLR": {"kind": "routed", "seed": 42, "skip": 0.25, "skip_padded": 0.18,
                    "perplexity_batches": 36.0}}
    for place, (variant, row) in enumerate(rows.items()):
        folder = tmp_path / "predecessor" / str(place)
        folder.mkdir(parents=True)
        row = row | {"variant": variant.strip(), "perplexity": 35.0}
        (folder / "metrics.json").write_text(json.dumps({"rows": [row]}))
    table = predecessor.ours(Results(tmp_path))
    own = dict(zip(table.columns, map(page._plain, table.rows[-1])))
    assert own == {"our row": "DLR", "trained for": "–", "seeds": "1", "skip of tokens": "25.0 %",
                   "skip, padding counted": "18.0 %", "perplexity": "35.00",
                   "by their average": "36.00", "over our base": "0.90",
                   "over our dense LoRA": "1.12"}
    assert [page._plain(cell) for cell in table.rows[1]][2] == "2"
    lists = claims.judged(Results(tmp_path))
    assert "1.12 times the perplexity of dense LoRA at 18.0 %" in lists[claims.HOLDS][0].striptags()
    assert "the predecessor's router has 3.13 at 18.0 %" in lists[claims.HOLDS][0].striptags()


def test_rows_of_one_name_that_were_trained_for_other_skips_are_no_seeds_of_each_other(tmp_path):
    """Nor is a row set beside dense LoRA of another seed."""
    dense = {"variant": "dense LoRA", "kind": "dense", "seed": 42, "skip": 0.0, "perplexity_batches": 32.0}
    routed = {"variant": "DLR at 24%", "kind": "routed", "skip": 0.25, "skip_padded": 0.24}
    for place, row in enumerate((dense, routed | {"seed": 42, "trained_skip": 0.18, "perplexity_batches": 36.0},
                                 routed | {"seed": 42, "trained_skip": 0.37, "perplexity_batches": 48.0},
                                 routed | {"seed": 43, "trained_skip": 0.5, "perplexity_batches": 64.0})):
        folder = tmp_path / "predecessor" / str(place)
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps({"rows": [row | {"perplexity": 35.0}]}))
    table = predecessor.ours(Results(tmp_path))
    rows = [dict(zip(table.columns, map(page._plain, row))) for row in table.rows]
    assert [(row["trained for"], row["seeds"], row["over our dense LoRA"]) for row in rows] == [
        ("–", "1", "1.00"), ("18 %", "1", "1.12"), ("37 %", "1", "1.50"), ("50 %", "1", "–")]
    said = [sentence.striptags() for _, sentence in predecessor.beside(Results(tmp_path))]
    assert len(said) == 2 and "DLR at 24% (trained for 37 %) has 1.50 times" in said[1]


def test_published_numbers_name_their_source_and_no_machine():
    text = (ROOT / PUBLISHED).read_text(encoding="utf-8")
    assert "predecessor's published results" in text and "/work" not in text
    marks = {mark for part in json.loads(text).values() for row in
             (part.get("rows", []) if isinstance(part, dict) else part)
             if isinstance(row, dict) for mark in row["caveats"]}
    assert marks == predecessor.CAVEATS.keys()


# -- how it is made again -------------------------------------------------------------------------
def test_commands_are_those_that_made_the_runs():
    results = Results(RECORDED)
    made = {run: commands.command_of(results, run) for run in commands.recorded(results)}
    assert made["token_routing/default"] == ("python -m dlr run token_routing", [])
    assert made["latency/nano"][0].endswith("--params params/latency/nano.yaml")
    for run, (command, _) in made.items():
        if " sweep " in command:
            phase, points = points_of(ROOT / command.split()[-1])
            assert run in [f"{phase}/{name}" for name, _ in points], run
    assert sum(" sweep " in command for command, _ in made.values()) >= 8


def test_every_work_cited_is_named_where_it_is_used():
    works = json.loads((page.HERE / "citations.json").read_text(encoding="utf-8"))
    for work in works:
        assert work["name"].lower() in (ROOT / work["file"]).read_text(encoding="utf-8").lower(), work
    assert len({work["text"] for work in works}) == len(works) >= 15


# -- the command ----------------------------------------------------------------------------------
@pytest.fixture
def few(tmp_path):
    """A results folder with one run."""
    shutil.copytree(RECORDED / "stages" / "default", tmp_path / "few" / "stages" / "default")
    return tmp_path / "few"


def test_the_command_writes_page_and_tables(few, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["report", "--results", str(few), "--out", str(out), "--no-pdf"]) == 0
    assert (out / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert (out / "tables" / "stages-default.tex").is_file() and not (out / "report.pdf").exists()
    first = (out / "report.html").read_bytes()
    assert main(["report", "--results", str(few), "--out", str(out), "--no-pdf"]) == 0
    assert (out / "report.html").read_bytes() == first, "the same results give the same page"
    assert main(["report", "--results", str(tmp_path / "none")]) == 2
    assert "holds no finished run" in capsys.readouterr().err


def test_a_run_recorded_before_rows_had_a_kind_is_reported(tmp_path):
    folder = tmp_path / "token_routing" / "default"
    shutil.copytree(RECORDED / "token_routing" / "default", folder)
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    for row in metrics["rows"]:
        del row["kind"], row["of"]
    (folder / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    whole, tables = page.page(Results(tmp_path), bar=False)
    versions = next(table for table in tables if table.name == "token_routing-default")
    names = [page._plain(row[0]) for row in versions.rows]
    assert "DLR" in names and "base" not in names and "DLR skips" in whole.striptags()


def test_without_a_browser_a_sentence_says_so(few, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(page, "browser", lambda: None)
    page.write_report(few, tmp_path / "out", say=said.append, bar=False)
    assert "No report.pdf" in said[-1]
    monkeypatch.setattr(page, "browser", lambda: "/nowhere/chromium")
    page.write_report(few, tmp_path / "out", say=said.append, bar=False)
    assert "No report.pdf" in said[-1] and not (tmp_path / "out" / "report.pdf").exists()


@pytest.mark.skipif(page.browser() is None, reason="no browser is at hand")
def test_a_browser_prints_it(few, tmp_path):
    page.write_report(few, tmp_path / "out", say=lambda text: None, bar=False)
    assert (tmp_path / "out" / "report.pdf").read_bytes().startswith(b"%PDF")
