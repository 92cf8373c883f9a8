"""The table of reduced models: every row beside the model as it was, costs counted, wrong settings in a sentence."""

from __future__ import annotations

import json

import pytest

from vitzoo.bench import __main__ as command
from vitzoo.bench import reduction


def test_fewer_tokens_cost_fewer_multiply_adds_and_both_are_timed(tmp_path, capsys):
    words = ["tokens", "vit_micro", "--method", 'tome:{"r": 3}', "--batch", "2", "--rounds", "1"]
    assert command.main([*words, "--json", str(tmp_path / "tokens.json")]) == 0
    (row,) = json.loads((tmp_path / "tokens.json").read_text())["results"]
    assert row["gmacs_ratio"] > 1.05
    assert min(row["throughput_ratio"], row["latency_ratio"], row["memory_ratio"]) > 0
    assert "| vit_micro | tome | r=3 | 2 |" in capsys.readouterr().out


def test_a_cost_that_depends_on_the_image_is_not_made_up():
    assert reduction.gmacs(reduction.Case("vit_micro", "ats")) is None


@pytest.mark.parametrize(
    ("words", "says"), [("tomes", "no method 'tomes'"), ("tome:{r}", "JSON object"), ('evit:{"r": 3}', "unexpected keyword")]
)
def test_wrong_settings_end_in_a_sentence(words, says):
    with pytest.raises(SystemExit, match=says):
        command.main(["tokens", "vit_micro", "--method", words])
