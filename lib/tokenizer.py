"""The task's texts as tokens: prompts, in the model's chat template if it has one, and solutions.

A tiny model has a word-level tokenizer over the task's closed vocabulary. A pretrained model keeps
its own; its prompts begin with a sentence that explains the notation. data/__init__.py says what a
problem and a task are.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lib.flags import fail, read_json, require, write_json
from lib.responses import composed
from lib.rng import rng

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
NO_TEMPLATE = "--no-chat-template does without"
DEFAULT_RESPONSE = 256  # longest response in tokens, where nothing tells how long solutions are

# A pretrained model's tokenizer is saved as it came: transformers 5 would write one that 4 cannot
# open. A new one says by `auto_map`, a known class twice, that it is no Qwen2Tokenizer; without it
# AutoTokenizer would give that to every model of the type qwen2, whatever words the model has.
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
FILES += ("vocab.json", "merges.txt", "tokenizer.model")
TEMPLATES = ("chat_template.jinja", "additional_chat_templates/*.jinja")
FAST = "PreTrainedTokenizerFast"
NEW_CONFIG = {"tokenizer_class": FAST, "auto_map": {"AutoTokenizer": [FAST, FAST]}}
NEW_CONFIG |= {"pad_token": PAD, "eos_token": EOS, "unk_token": UNKNOWN}


class Tokenizer:
    """A model's tokenizer. Its EOS token ends a solution; any of `stops` ends a response."""

    def __init__(self, inner: PreTrainedTokenizerFast, stops=(), files: dict | None = None):
        self.inner = inner
        self.stops = sorted({inner.eos_token_id, *stops})
        self.files = files or {}  # a pretrained one's, by name, to be saved as they were

    def __len__(self) -> int:
        return len(self.inner)

    @property
    def word_level(self) -> bool:
        """Whether it belongs to a tiny model made here, not to a pretrained one."""
        return isinstance(self.inner.backend_tokenizer.model, models.WordLevel)

    def prompt(self, problem) -> list[int]:
        """Return the tokens of a problem's prompt, and of its response's prefix."""
        return self.question(problem) + self.prefix(problem)

    def prefix(self, problem) -> list[int]:
        return self.solution(problem.prefix)[:-1]

    def question(self, problem) -> list[int]:
        """Return the tokens of a problem's prompt alone, in the chat template if there is one."""
        messages = self.messages(problem)
        if self.inner.chat_template is None:
            text = "\n\n".join(message["content"] for message in messages)
            return self.inner.encode(text)  # with the BOS token, if the model has one
        # Llama's template would write today's date, and resuming differ; Qwen3's would think first.
        options = {"date_string": "26 Jul 2024", "enable_thinking": False, "return_dict": False}
        options["add_generation_prompt"] = True
        try:
            return self.inner.apply_chat_template(messages, **options)
        except Exception as error:  # a template is a program
            fail(f"the model's chat template fails ({NO_TEMPLATE}): {str(error)[:300]}")

    def messages(self, problem) -> list[dict[str, str]]:
        """Return what the model is asked, after a system prompt if there is one."""
        explained = "" if self.word_level else problem.explanation
        asked = "\n\n".join(filter(None, (explained, problem.prompt())))
        messages = [("system", problem.system), ("user", asked)]
        return [{"role": role, "content": text} for role, text in messages if text]

    def solution(self, text: str) -> list[int]:
        """Return the tokens of a solution, with the stop token."""
        return [*self.inner.encode(text, add_special_tokens=False), self.inner.eos_token_id]

    def save(self, folder: Path) -> None:
        """Write the files from which it was loaded, or those of a new one."""
        if not self.files:
            self.inner.save_pretrained(folder)
            write_json(folder / "tokenizer_config.json", NEW_CONFIG)
        for name, content in self.files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)

    def decode(self, rows: list[list[int]]) -> list[str]:
        return self.inner.batch_decode(rows, clean_up_tokenization_spaces=False)

    def checked_prompts(self, problems: list) -> list[list[int]]:
        """Return the prompts; refuse those that lose the problem or end in a stop token.

        After a stop token models say anything. White space behind it does not count.
        """
        questions = [self.question(problem) for problem in problems]
        for problem, prompt, text in zip(problems, questions, self.decode(questions)):
            asked, at = [m["content"] for m in self.messages(problem)], in_file(problem)
            held = all(composed(x) in composed(text) for x in asked)
            advice = f" ({NO_TEMPLATE})" * (self.inner.chat_template is not None)
            require(held, f"{at}the model's prompts do not hold the problem{advice}")
            for token in reversed(prompt):
                ends = f"{at}the model's prompts end in a stop token, which begins no answer"
                require(token not in self.stops, ends)
                if self.decode([[token]])[0].strip():
                    break
        return [asked + self.prefix(x) for asked, x in zip(questions, problems)]

    def require_vocabulary(self, words: list[str]) -> None:
        """Refuse a tokenizer that cannot write these words."""
        known = self.decode([self.solution(" ".join(words))[:-1]])[0].split()
        missing = repr(next((word for word in words if word not in known), "the order of words"))
        require(known == words, f"the model's tokenizer cannot write {missing}")

    def max_response_tokens(
        self, task, max_positions: int, wanted: int = 0, problems: Sequence = ()
    ) -> int:
        """Return how many tokens a response may take: `wanted`, or if 0 what solutions need.

        Refuses a model whose `max_positions` are too few for prompts and responses, and prompts of
        task or `problems` that do not hold the problem.
        """
        examples, solutions = task.examples(rng("token budget"))
        budget = wanted or self.budget_for(solutions)
        self.require_fit([*examples, *problems], budget, max_positions)
        return budget

    def budget_for(self, solutions: list[str]) -> int:
        """Return the tokens of the longest solution and a line more; of none, DEFAULT_RESPONSE."""
        if not solutions:
            return DEFAULT_RESPONSE
        lines = [line for solution in solutions[:2] for line in solution.split("\n")]
        return sum(max(len(self.solution(x)) - 1 for x in texts) for texts in (lines, solutions))

    def require_fit(self, problems: list, budget: int, max_positions: int) -> None:
        """Refuse problems whose prompt, answer or own response the model cannot hold or write."""
        for problem, prompt in zip(problems, self.checked_prompts(problems)):
            at, n = in_file(problem), len(prompt) + budget
            fits = n <= max_positions
            require(fits, f"{at}prompt and response take {n} of {max_positions} positions")
            n = len(self.solution(problem.answer)) if at else 0
            require(n <= budget, f"{at}the answer takes {n} tokens, more than {budget}")
        own = [problem for problem in problems if "response" in getattr(problem, "row", ())]
        solved = [self.solution(x.row["response"])[:-1] for x in own]
        for problem, tokens, text in zip(own, solved, self.decode(solved)):
            ends = f"{in_file(problem)}'response' holds a stop token, at which sampling would end"
            require({*self.stops}.isdisjoint(tokens), ends)
            lost = f"{in_file(problem)}the model's tokenizer makes {text[:200]!r} of 'response'"
            require(problem.is_correct(text), f"{lost}, of which the answer is another")


def in_file(problem) -> str:
    return f"{problem.where}: " if problem.where else ""


def word_tokenizer(words: list[str]) -> Tokenizer:
    """Return a word-level tokenizer over `words`; any white space separates words."""
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys([PAD, EOS, UNKNOWN, *words]))}
    backend = Backend(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {key: NEW_CONFIG[key] for key in ("pad_token", "eos_token", "unk_token")}
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, **special))


def portable_config(config: dict, chat_template: bool) -> dict:
    """Return a tokenizer_config.json that transformers 4 opens, too, without its template or with.

    What transformers 5 saves as its TokenizersBackend, 4 knows as PreTrainedTokenizerFast.
    """
    config = {key: x for key, x in config.items() if key != "chat_template" or chat_template}
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = FAST
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    return config


def load_tokenizer(folder: Path, chat_template: bool = True) -> Tokenizer:
    """Load the tokenizer of a Hugging Face folder, with or without its chat template."""
    for name in (*FILES, "chat_template.jinja", "generation_config.json"):  # links to nothing
        file = folder / name
        require(file.exists() or not file.is_symlink(), f"{file} is broken")
    try:
        # AutoTokenizer would ignore tokenizer.json and use Qwen2's own BPE.
        inner = PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:  # the tokenizers library raises no narrower one
        fail(f"cannot read the tokenizer in {folder}: {str(error)[:300]}")
    require(inner.eos_token_id is not None, f"the tokenizer in {folder} names no EOS token")
    if not chat_template:
        inner.chat_template = None
    found = [x for name in FILES + TEMPLATES * chat_template for x in folder.glob(name)]
    files = {str(file.relative_to(folder)): file.read_bytes() for file in found if file.is_file()}
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.exists() else {}
    if (portable := portable_config(config, chat_template)) != config:
        files[path.name] = json.dumps(portable, indent=2).encode()
    path = folder / "generation_config.json"
    if not path.exists():
        path = folder / "config.json"
    given = read_json(path).get("eos_token_id") if path.exists() else None
    stops = given if isinstance(given, list) else [] if given is None else [given]
    known = set(inner.get_vocab().values())
    sound = all(type(stop) is int and stop in known for stop in stops)
    require(sound, f"{path}: bad eos_token_id")
    return Tokenizer(inner, stops, files)
