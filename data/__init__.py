"""Problems: the paper's (finite_field.py), or anybody's (jsonl.py). What a task has to offer:

task.words                             every word of its texts, for a new model's tokenizer
task.sample(rng, split, index=None)    a problem; of a finite set that of an index
task.validation(n, rng)                n problems that training never sees
task.solution(problem, strategy, rng)  a worked solution, for SFT
task.examples(rng)                     problems and solutions, the longest included
task.about                             what its problems are, for a heading

problem.prompt(), .explanation, .system     the question; before it, a sentence or a system prompt
problem.prefix                              what of the response is given, "" for nothing
problem.kind, .difficulty, .answer          texts; tables group by the first two
problem.is_correct(response, stopped)       what tables count
problem.reward(response, stopped)           the float that trains
problem.label(response)                     the strategy (of finite_field.py's: strategies.tag)
problem.where                               file and line, for messages; "" for no file

A new task in Python is a branch in load_problems and a flag in the three configs. Its labels and
kinds are none of jsonl.TAKEN, the log's own names.
"""

from lib.flags import flag_name, require, user_errors

# The flags of the paper's task, which --data refuses: a new one belongs here, too
OF_THE_PAPER = ("difficulty", "steps", "parts", "field", "relabel", "evaluation_share")
OF_THE_PAPER += ("strategy", "window", "force", "given")


@user_errors()
def load_problems(config, n: int, field: int | None = None, relabel: str = "") -> tuple:
    """Return the task that a script's flags describe, and n validation problems.

    `field` and `relabel` are those of a checkpoint, instead of flags. A file's task sets the number
    of --examples, where that is not given, to that of its problems.
    """
    from lib.rng import rng  # torch takes seconds to import

    if config.data:
        from data import jsonl

        for flag in {*vars(config)} & {*OF_THE_PAPER}:
            default = type(config).__dataclass_fields__[flag].default
            same = getattr(config, flag) == default
            require(same, f"{flag_name(flag)} is of the paper's task, not of --data")
        task = jsonl.Task(config)
        if getattr(config, "examples", 0) is None:
            config.examples = len(task.train)
        fewer = f"{config.data} holds {len(task.train)} training problems: give fewer --examples"
        enough = getattr(config, "examples", 0) <= len(task.train)
        require(enough or config.resume, fewer)  # a run that is resumed keeps its flags
    else:
        from data import finite_field

        for flag in ("answer_pattern", "reward", "tagger"):
            require(not getattr(config, flag, ""), f"{flag_name(flag)} needs --data")
        task = finite_field.Task.from_flags(config, field, relabel)
    return task, task.validation(n, rng(config.seed, "validation problems"))
