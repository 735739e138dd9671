"""What the models read: words, or tokens of a pretrained model in its chat template."""

import json
import random

import pytest
from conftest import word_tokenizer

from data.finite_field import BACKWARD, FORWARD, Task, vocabulary
from lib.tokenizer import load_tokenizer

PROBLEM = Task().sample(random.Random(0), "train")


def test_a_word_level_tokenizer_writes_what_it_reads():
    tokenizer, rng = word_tokenizer(13), random.Random(0)
    for _ in range(10):
        problem = Task(p=13, parts=(1, 2), relabel="shown").sample(rng, "train")
        prompt, *solutions = tokenizer.decode(
            [
                tokenizer.prompt(problem),
                *(tokenizer.solution(problem.solution(s))[:-1] for s in (FORWARD, BACKWARD)),
            ]
        )
        assert prompt.split() == problem.prompt().split()
        assert [s.split() for s in solutions] == [
            problem.solution(s).split() for s in (FORWARD, BACKWARD)
        ]


def test_a_pretrained_model_is_asked_in_its_chat_template(pretrained):
    tokenizer = load_tokenizer(pretrained)
    (text,) = tokenizer.decode([tokenizer.prompt(PROBLEM)])
    asked = f"{PROBLEM.explanation}\n\n{PROBLEM.prompt()}"
    assert text == f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"
    assert "GF(11)" in PROBLEM.explanation and "e0 to e10" in PROBLEM.explanation
    assert not tokenizer.word_level
    tokenizer.require_vocabulary(vocabulary(11))


def test_without_the_template_a_prompt_begins_as_the_model_expects(pretrained):
    """Llama's tokenizers put a token before every text."""
    file = pretrained / "tokenizer.json"
    backend = json.loads(file.read_text())
    one = [
        {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ]
    begins = {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}}
    backend["post_processor"] = {
        "type": "TemplateProcessing",
        "single": one,
        "pair": one,
        "special_tokens": begins,
    }
    file.write_text(json.dumps(backend))
    tokenizer = load_tokenizer(pretrained, chat_template=False)
    (text,) = tokenizer.decode([tokenizer.prompt(PROBLEM)])
    assert text == f"<|im_start|>{PROBLEM.explanation}\n\n{PROBLEM.prompt()}"
    assert tokenizer.solution("answer e1")[0] != 1, "a solution goes on where the prompt ends"
    assert load_tokenizer(pretrained).prompt(PROBLEM).count(1) == 2, "the template brings its own"


def test_every_stop_token_of_the_generation_config_counts(pretrained):
    tokenizer = load_tokenizer(pretrained)
    assert tokenizer.stops == [0, 2] and tokenizer.solution("answer e1")[-1] == 2
    (pretrained / "generation_config.json").write_text('{"eos_token_id": 0}')
    assert load_tokenizer(pretrained).stops == [0, 2], (
        "the tokenizer's own, with which solutions end, counts too"
    )
    (pretrained / "generation_config.json").write_text('{"eos_token_id": null}')
    assert load_tokenizer(pretrained).stops == [2]
    (pretrained / "generation_config.json").unlink()
    assert load_tokenizer(pretrained).stops == [2]


def test_a_prompt_does_not_depend_on_the_day(pretrained):
    """Llama's template writes today's date."""
    dated = "{%- if not date_string is defined %}"
    dated += "{%- set date_string = strftime_now('%s %N') %}{%- endif %}"
    (pretrained / "chat_template.jinja").write_text(
        dated + "{{ date_string }} {{ messages[0]['content'] }}"
    )
    tokenizer = load_tokenizer(pretrained)
    assert tokenizer.decode([tokenizer.prompt(PROBLEM)])[0].startswith("26 Jul 2024 The elements")


def test_a_model_that_can_think_is_asked_not_to(pretrained):
    """Qwen3's template then closes the thinking before the answer begins."""
    thinks = (
        "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
    )
    (pretrained / "chat_template.jinja").write_text("{{ messages[0]['content'] }}" + thinks)
    tokenizer = load_tokenizer(pretrained)
    assert tokenizer.decode([tokenizer.prompt(PROBLEM)])[0].endswith("<think></think>")


def test_a_saved_tokenizer_remembers_whether_it_has_a_template(pretrained, tmp_path):
    load_tokenizer(pretrained, chat_template=False).inner.save_pretrained(tmp_path / "plain")
    load_tokenizer(pretrained).inner.save_pretrained(tmp_path / "chat")
    plain, chat = (load_tokenizer(tmp_path / name).prompt(PROBLEM) for name in ("plain", "chat"))
    assert len(chat) > len(plain)


@pytest.mark.parametrize(
    "spoiled", ['{"eos_token_id": 9999}', '{"eos_token_id": ["x"]}', "[]", "{"]
)
def test_bad_stop_tokens_are_refused(spoiled, pretrained, capsys):
    (pretrained / "generation_config.json").write_text(spoiled)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        load_tokenizer(pretrained)
    assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
