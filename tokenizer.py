"""The task's texts as tokens: prompts, in the model's chat template where it has one, solutions, and responses.

A tiny model has a word-level tokenizer over the task's closed vocabulary. A pretrained model keeps its own; its prompts
begin with a sentence that explains the notation.
"""

from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data.finite_field import Problem, vocabulary
from runtime import fail, read_json, require

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"


class Tokenizer:
    """A model's tokenizer. A solution ends with its end-of-sequence token; any of `stops` ends a response."""

    def __init__(self, inner: PreTrainedTokenizerFast, stops: list[int] | None = None):
        self.inner = inner
        self.stops = sorted({inner.eos_token_id, *(stops or [])})

    def __len__(self) -> int:
        return len(self.inner)

    @property
    def word_level(self) -> bool:
        """Whether it is that of a model made here from scratch, and not a pretrained model's."""
        return isinstance(self.inner.backend_tokenizer.model, models.WordLevel)

    def prompt(self, problem: Problem) -> list[int]:
        if self.word_level:
            return self.inner.encode(problem.prompt())
        text = f"{problem.explanation}\n\n{problem.prompt()}"
        if self.inner.chat_template is None:
            return self.inner.encode(text)  # with the token that begins a sequence, where the model has one
        options = {"add_generation_prompt": True, "return_dict": False}
        options["date_string"] = "26 Jul 2024"  # Llama's template would write today's: a resumed run shall not notice
        options["enable_thinking"] = False  # Qwen3's: solutions are written out at once
        return self.inner.apply_chat_template([{"role": "user", "content": text}], **options)

    def solution(self, text: str) -> list[int]:
        return [*self.inner.encode(text, add_special_tokens=False), self.inner.eos_token_id]

    def decode(self, rows: list[list[int]]) -> list[str]:
        return self.inner.batch_decode(rows, clean_up_tokenization_spaces=False)

    def line_starts(self) -> list[int]:
        """The tokens, words here, that begin a line which others refer to."""
        words = self.inner.get_vocab().items()
        return [i for word, i in words if word in ("start", "end") or word[-1] == ":"]

    def check(self, p: int) -> None:
        """Refuse a tokenizer that cannot write the problems of GF(p)."""
        words = vocabulary(p)
        known = self.decode([self.solution(" ".join(words))[:-1]])[0].split()
        missing = next((word for word in words if word not in known), "the order of words")
        require(known == words, f"the model's tokenizer cannot write {missing!r}, which problems of GF({p}) need")


def word_tokenizer(p: int) -> Tokenizer:
    """A word-level tokenizer over the vocabulary of GF(p); white space of any kind separates words."""
    words = {word: i for i, word in enumerate([PAD, EOS, UNKNOWN, *vocabulary(p)])}
    backend = Backend(models.WordLevel(words, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=PAD, eos_token=EOS, unk_token=UNKNOWN))


def load_tokenizer(folder: Path, chat_template: bool = True) -> Tokenizer:
    """The tokenizer in a Hugging Face folder; without `chat_template` its template, if any, is forgotten."""
    try:
        # AutoTokenizer would put Qwen2's own BPE in the place of whatever tokenizer.json says.
        inner = PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:  # the tokenizers library raises no narrower one
        fail(f"cannot read the tokenizer in {folder}: {str(error)[:300]}")
    require(inner.eos_token_id is not None, f"the tokenizer in {folder} names no end-of-sequence token")
    if not chat_template:
        inner.chat_template = None
    stops = []
    if (path := folder / "generation_config.json").exists():
        stops = read_json(path).get("eos_token_id")
        stops = stops if isinstance(stops, list) else [] if stops is None else [stops]
        require(all(type(stop) is int and 0 <= stop < len(inner) for stop in stops), f"{path}: bad eos_token_id")
    return Tokenizer(inner, stops)
