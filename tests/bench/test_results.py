"""The files of a benchmark: written and read again alike; what is broken or foreign is named and left out."""

import json

import pytest
from made_up import make_result

from sftlab.bench import results

RESULT = make_result(4, "strong", nodes=2, rates=(1000.0, 1010.0), model="random:Llama-2-7b-hf")
# What stands in a file, what is put in its place, and what is said.
FAULTS = [('"schema": 1', '"schema": 2', "schema: Input should be 1"), ('"runs": [', "", "Invalid JSON")]
FAULTS += [('"runs": [', '"runs": [], "others": [', "runs: List should have at least 1 item")]
FAULTS += [('"tokens_per_second": 1010.0', '"tokens_per_second": NaN', "runs.1.tokens_per_second: Input should be")]
FAULTS += [('"p10": ', '"p10": -', "runs.0.step_seconds.p10: Input should be greater than 0")]
FAULTS += [('"devices": 4', '"devices": 1.5', "point.devices: Input should be a valid integer")]
FAULTS += [('"point"', '"loss"', "point: Field required")]


def test_what_is_written_is_read_again(tmp_path):
    path = results.write_result(tmp_path, RESULT)
    assert path.name == "random-Llama-2-7b-hf_1000_2x2_strong.json"
    older = json.loads(path.read_text()) | {"config_hash": "0" * 12}  # had more fields
    older["runs"][0] |= {"samples_per_second": 20.0}
    path.write_text(json.dumps(older))
    assert results.read_results(tmp_path) == ([RESULT], []) and results.read_results(tmp_path / "none") == ([], [])


@pytest.mark.parametrize(("old", "new", "message"), FAULTS)
def test_a_file_that_is_torn_foreign_or_impossible_is_named_and_left_out(old, new, message, tmp_path):
    path, other = results.write_result(tmp_path, RESULT), make_result(model="z")
    path.write_text(path.read_text().replace(old, new, 1))
    results.write_result(tmp_path, other)
    found, [problem] = results.read_results(tmp_path)
    assert found == [other] and problem.startswith(f"{path}: {message}") and problem.endswith("; left out")
