"""What the models read: words, or tokens of a pretrained model in its chat template."""

import json
import random
from types import SimpleNamespace

import pytest
from conftest import CHAT, refusal, word_tokenizer

import lib.tokenizer
from data.finite_field import BACKWARD, FORWARD, Task, vocabulary
from lib.tokenizer import load_tokenizer
from lib.training import find_tokenizer

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


SPOILED = {  # a chat template; what is said of its prompts
    "raises": ("{{ raise_exception('only system messages') }}", "only system messages"),
    "raises for some problems": (
        "{% if '?' in messages[0].content %}{{ raise_exception('no ?') }}{% endif %}",
        "no ?",
    ),
    "raises for short ones alone": (
        "{% if messages[0].content.count('\\n') < 8 %}{{ raise_exception('too short') }}{% endif %}"
        "{{ messages[0].content }}",
        "too short",
    ),
    "drops the explanation": (
        "{{ messages[0].content.split('\\n', 1)[1] }}",
        "do not hold the problem",
    ),
    "is broken": ("{% for m in messages %}", "chat template fails"),
    "asks for what is not there": ("{{ messages[1].content }}", "chat template fails"),
    "is empty": ("", "do not hold the problem"),
    "writes white space": ("  \n ", "do not hold the problem"),
    "drops the message": ("user: {{ 'hello' }} assistant:", "do not hold the problem"),
    "cuts the message": ("{{ messages[0].content[:200] }}", "do not hold the problem"),
    "changes the message": ("{{ messages[0].content | upper }}", "do not hold the problem"),
    "escapes the message": ("{{ messages[0].content | tojson }}", "do not hold the problem"),
    "ends the turn": ("{{ messages[0].content }}<|im_end|>", "end in a stop token"),
    "ends the turn and the line": ("{{ messages[0].content }}<|im_end|>\n\n", "stop token"),
}


@pytest.mark.parametrize("how", SPOILED)
def test_a_chat_template_that_spoils_the_prompts_is_refused(how, pretrained, capsys):
    template, says = SPOILED[how]
    (pretrained / "chat_template.jinja").write_text(template)
    tokenizer = load_tokenizer(pretrained)
    line = refusal(lambda: tokenizer.max_response_tokens(Task(), 2048), capsys)
    assert says in line
    assert load_tokenizer(pretrained, chat_template=False).max_response_tokens(Task(), 2048) > 50


@pytest.mark.parametrize("template", ["{{ messages[0].content | trim }}", CHAT])
def test_a_chat_template_may_trim_the_message(template, pretrained):
    (pretrained / "chat_template.jinja").write_text(template)
    assert load_tokenizer(pretrained).max_response_tokens(Task(), 2048) > 50


def test_a_word_may_be_a_special_token():
    """It has that token's number, which is below the model's vocabulary."""
    tokenizer = lib.tokenizer.word_tokenizer(["a", "<eos>", "b"])
    assert sorted(tokenizer.inner.get_vocab().values()) == [*range(len(tokenizer))] == [*range(5)]


def test_a_tokenizer_that_ends_every_prompt_is_refused(pretrained, capsys):
    """A post-processor may append the stop token."""
    file = pretrained / "tokenizer.json"
    backend = json.loads(file.read_text())
    sequence, end = {"Sequence": {"id": "A", "type_id": 0}}, "<|im_end|>"
    pieces = [sequence, {"SpecialToken": {"id": end, "type_id": 0}}]
    special = {end: {"id": end, "ids": [2], "tokens": [end]}}
    options = {"single": pieces, "pair": [sequence] * 2, "special_tokens": special}
    backend["post_processor"] = {"type": "TemplateProcessing", **options}
    file.write_text(json.dumps(backend))
    tokenizer = load_tokenizer(pretrained, chat_template=False)
    assert tokenizer.prompt(PROBLEM)[-1] == 2
    line = refusal(lambda: tokenizer.max_response_tokens(Task(), 2048), capsys)
    assert "end in a stop token" in line


def test_the_models_config_names_stop_tokens_where_no_other_file_does(pretrained):
    """As in transformers: generation_config.json counts first."""
    (pretrained / "generation_config.json").unlink()
    config = json.loads((pretrained / "config.json").read_text())
    (pretrained / "config.json").write_text(json.dumps(config | {"eos_token_id": [0, 2]}))
    assert load_tokenizer(pretrained).stops == [0, 2]


@pytest.mark.parametrize(
    "spoiled", ['{"eos_token_id": 9999}', '{"eos_token_id": ["x"]}', "[]", "{"]
)
def test_bad_stop_tokens_are_refused(spoiled, pretrained, capsys):
    (pretrained / "generation_config.json").write_text(spoiled)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        load_tokenizer(pretrained)
    assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


def test_the_chat_template_is_a_flag(pretrained):
    for given in (False, True):
        found = find_tokenizer(SimpleNamespace(no_chat_template=given), None, pretrained)
        assert (found.inner.chat_template is None) == given
