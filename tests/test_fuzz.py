"""Properties that hold for any input, by hypothesis; tests/fuzz_tagger.py tries for longer."""

import json
from types import SimpleNamespace

import pytest
from fuzz_tagger import check, mutated, problem_number

from data.finite_field import Task, vocabulary
from lib.checkpoint import read_config
from lib.files import verify_manifest
from lib.run_dir import read_log

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

many = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
fewer = settings(many, max_examples=150)  # of JSON, which takes long to draw
words = st.lists(
    st.sampled_from([*vocabulary(13), "e٣", "xanswer", "912:", "\n", "e99999", "e12345678901"])
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda x: st.lists(x) | st.dictionaries(st.text(), x),
)


@many
@given(st.integers(0, 400), words.map(" ".join) | st.text())
@example(0, "answer e" + "1" * 5000)
@example(0, "guess end e٣")
@example(0, "xanswer e1 912345: e1 + e2 = e3 answer e12345")
def test_any_text_can_be_tagged(number, text):
    check(problem_number(number), text)


@many
@given(st.data(), st.integers(0, 400))
def test_any_change_of_a_solution_can_be_tagged(data, number):
    problem = problem_number(number)
    check(problem, mutated(problem, lambda n: data.draw(st.integers(0, n - 1))))


@many
@given(st.text(max_size=8), st.text(max_size=8), st.integers(-5, 30) | st.integers(), st.floats())
def test_any_flags_make_a_task_or_a_value_error(steps, parts, p, share):
    flags = {"difficulty": "easy", "steps": steps, "parts": parts, "field": p, "relabel": "fixed"}
    try:
        Task.from_flags(SimpleNamespace(**flags, evaluation_share=share))
    except ValueError as error:
        assert str(error)


def refused_or_fine(function) -> None:
    """Call a function that may exit with status 2; a user would see any other error."""
    try:
        function()
    except SystemExit as stop:
        assert stop.code == 2


CONFIG = [
    "model_type",
    "hidden_size",
    "rope_scaling",
    "rope_parameters",
    "layer_types",
    "hidden_act",
    "head_dim",
]
CONFIG += [
    "num_attention_heads",
    "tie_word_embeddings",
    "rms_norm_eps",
    "use_sliding_window",
    "vocab_size",
]
SOUND = {
    "model_type": "llama",
    "vocab_size": 9,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
}
SOUND |= {
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 9,
}


@fewer
@given(st.dictionaries(st.sampled_from(CONFIG), json_values) | json_values)
def test_any_config_is_read_or_refused(tmp_path, changes):
    config = SOUND | changes if isinstance(changes, dict) else changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused_or_fine(lambda: read_config(tmp_path))


@fewer
@given(st.binary() | json_values.map(lambda value: json.dumps(value).encode() + b"\n"))
@example(b"[" * 100_000 + b"\n")
def test_any_log_is_read_or_refused(tmp_path, content):
    (tmp_path / "metrics.jsonl").write_bytes(content)
    refused_or_fine(lambda: read_log(tmp_path / "metrics.jsonl"))


@fewer
@given(st.binary() | json_values.map(lambda value: json.dumps(value).encode()))
def test_any_manifest_is_no_traceback(tmp_path, content):
    (tmp_path / "manifest.json").write_bytes(content)
    assert verify_manifest(tmp_path) is None or isinstance(verify_manifest(tmp_path), str)
