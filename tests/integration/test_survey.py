"""tests/survey.py: the table of architectures."""

import importlib.util

from conftest import ROOT


def test_survey_writes_the_table(tmp_path):
    spec = importlib.util.spec_from_file_location("survey", ROOT / "tests" / "survey.py")
    survey = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(survey)
    survey.main(tmp_path / "table.md", "mamba", "llama")
    table = (tmp_path / "table.md").read_text()
    assert "| llama | ok | ok | ok | ok |" in table
    assert table.index("| llama |") < table.index("| mamba | ok, separate rows |")
    ok, refused = dict.fromkeys(survey.COLUMNS, "ok"), {"training": "refused: a|b"}
    page = survey.page({"c": ok, "b": refused, "a": ok})
    assert page.index("| a, c | ok | ok | ok | ok |") < page.index("| b | refused: a/b |  |  |  |")
