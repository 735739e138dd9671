"""Read the paper's task back from text: a problem from its prompt, lines from a response.

White space does not matter, so what a tokenizer made of the line breaks does not, either.
"""

import re
from dataclasses import dataclass

from data.finite_field import (
    BACKWARD,
    EVALUATION,
    FORWARD,
    INVERSION,
    Field,
    Problem,
    make_field,
    make_part,
)

N = r"(?:0|[1-9]\d{0,3})"  # without leading zeros
LINE = re.compile(  # of whole words
    r"(?<![^ ])(?:"
    rf"(?P<guess>guess )?(?P<side>start|end) (?P<value>e{N})"
    rf"|(?P<label>{N}): (?P<left>e{N}) (?P<op>[-+*/]) (?P<right>e{N}) = e{N}"
    rf"|answer (?P<answer>e{N})"
    r")(?![^ ])",
    re.ASCII,
)


@dataclass(frozen=True)
class Line:
    form: str  # "anchor" (an opening or closing), "step", "answer" or "other"
    text: str
    guess: bool = False
    side: str = ""
    value: str = ""  # of an anchor
    label: int = 0
    left: str = ""
    op: str = ""
    right: str = ""

    @property
    def direction(self) -> str | None:
        """Return the direction in which a step goes."""
        return {"+": FORWARD, "*": FORWARD, "-": BACKWARD, "/": BACKWARD}.get(self.op)


def parse_lines(response: str) -> list[Line]:
    """Return the lines in order; text between two recognised ones is one line of form "other"."""
    text, lines, end = " ".join(response.split()), [], 0
    for match in LINE.finditer(text):
        if between := text[end : match.start()].strip():
            lines.append(Line("other", between))
        end = match.end()
        if match["side"]:
            guess = bool(match["guess"])
            lines.append(Line("anchor", match[0], guess, match["side"], match["value"]))
        elif match["answer"]:
            lines.append(Line("answer", match[0]))
        else:
            step = {key: match[key] for key in ("left", "op", "right")}
            lines.append(Line("step", match[0], label=int(match["label"]), **step))
    if rest := text[end:].strip():
        lines.append(Line("other", rest))
    return lines


# ------------------------------------------------------------------------------------------------
# Prompts

ONE_PART = r"start (e\d{1,4}|\?|carry)((?: \d{1,4}: [+*] e\d{1,4})+) end (e\d{1,4}|\?|carry) "
PROMPT = re.compile(
    rf"(?<![^ ])(?:elements((?: e\d{{1,4}})+) )?((?:{ONE_PART})+)solution:", re.ASCII
)
FIELD = re.compile(r"elements of GF\((\d{1,4})\)", re.ASCII)  # in the explanation


def parse_prompt(text: str, p: int = 11) -> Problem:
    """Return the last problem in a text, whatever chat template or instructions are around it.

    The field is the one that the text names, or GF(p). Raises ValueError if there is no problem.
    """
    text = " ".join(text.split())
    found = [*PROMPT.finditer(text)]
    if not found:
        raise ValueError("the prompt holds no problem")
    named = FIELD.findall(text[: found[-1].end()])
    field, names = make_field(int(named[-1]) if named else p), found[-1][1]
    if names:
        field = Field(len(names.split()), tuple(int(name[1:]) for name in names.split()))
        make_field(field.p)  # refuses what is no prime
    if sorted(field.names) != list(range(field.p)):
        raise ValueError("the prompt does not list each element once")
    parts, carried, first_label = [], None, 0
    for start, steps, end in re.findall(ONE_PART, found[-1][2]):
        kind = EVALUATION if end == "?" else INVERSION
        given = start if kind == EVALUATION else end
        known = carried if given == "carry" else field.value(given) if given != "?" else None
        words = steps.split()
        operations = [(op, field.value(name)) for op, name in zip(words[1::3], words[2::3])]
        if known is None or any(b is None or (op, b) == ("*", 0) for op, b in operations):
            raise ValueError(f"the problem is none of GF({field.p})")
        first_label = first_label or int(words[0][:-1])
        parts.append(make_part(field, kind, operations, known))
        carried = parts[-1].asked
    problem = Problem(field, tuple(parts), first_label, shown=bool(names))
    if " ".join(problem.prompt().split()) != found[-1][0]:
        raise ValueError("the problem is not written as ours are")
    return problem
