"""The files of a benchmark: written and read again alike; what is broken or foreign is named and left out."""

import json

import pytest
from made_up import make_result

from sftlab.bench import results

RESULT = make_result(4, "strong", nodes=2, rates=(1000.0, 1010.0), model="random:Llama-2-7b-hf")


def test_what_is_written_is_read_again(tmp_path):
    path = results.write_result(tmp_path, RESULT)
    assert path.name == "random-Llama-2-7b-hf_1000_2x2_strong.json"
    older = json.loads(path.read_text()) | {"config_hash": "0" * 12}  # had more fields
    older["runs"][0] |= {"samples_per_second": 20.0}
    path.write_text(json.dumps(older))
    assert results.read_results(tmp_path) == ([RESULT], [])


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        ("schema", 2, "schema: Input should be 1"),
        ("runs", [], "runs: List should have at least 1 item"),
        ("runs.1.tokens_per_second", float("nan"), "runs.1.tokens_per_second: Input should be"),
        ("runs.0.step_seconds.p10", -5.0, "runs.0.step_seconds.p10: Input should be greater than 0"),
        ("point.devices", 1.5, "point.devices: Input should be a valid integer"),
    ],
)
def test_a_file_with_an_impossible_value_is_named_and_left_out(keys, value, message, tmp_path):
    path = results.write_result(tmp_path, RESULT)
    content = place = json.loads(path.read_text())
    *above, last = [int(key) if key.isdigit() else key for key in keys.split(".")]
    for key in above:
        place = place[key]
    place[last] = value
    path.write_text(json.dumps(content))
    found, [problem] = results.read_results(tmp_path)
    assert not found and str(path) in problem
    with pytest.raises(ValueError, match=message):
        results.read_result(path)


def test_torn_and_foreign_files_are_named(tmp_path):
    whole = results.write_result(tmp_path, RESULT)
    (tmp_path / "torn.json").write_text(whole.read_text()[:300])
    (tmp_path / "other.json").write_text('{"loss": 3}')
    results.write_result(tmp_path, other := make_result(model="z"))
    found, problems = results.read_results(tmp_path)
    assert found == [RESULT, other] and len(problems) == 2
    assert results.read_results(tmp_path / "nothing") == ([], [])
