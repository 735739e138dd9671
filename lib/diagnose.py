"""Say what has gone wrong: for some time in a GRPO run, by the last rows of its log; in SFT."""

from statistics import fmean

LEARNED = 0.5  # least accuracy given the matching strategy from which RL should start
UNLEARNED = """SFT has not learned its own problems: most responses are wrong, also those with the
    matching strategy. Train longer (--updates, --epochs) before RL, or give more --max-new-tokens
    if responses are cut off"""
DIAGNOSE_WINDOW = 20  # updates over which a problem has to last
TRUNCATED = """every response is cut off before its end: give more --max-new-tokens, or train the
    start longer by SFT"""
SOLVED = """every response is right, so nothing is learned any more: stop here, or go on with harder
    problems (--steps, --difficulty extreme)"""
NO_SIGNAL = """all responses to a problem earn the same, so nothing is learned: try easier problems
    (--steps), a larger --group-size, a higher --temperature or more SFT"""
SKIPPED = "an update was skipped: its loss or gradient is not finite. Five in a row end the run"
COLLAPSED = """the policy has collapsed: its entropy is near zero though many responses are wrong.
    Start again with a lower --lr, a KL term (--beta 0.05) or a larger --clip-high"""


def diagnose(rows: list[dict]) -> set[str]:
    """Return what is wrong in words that say what to try; empty if all is well."""
    recent, messages = rows[-DIAGNOSE_WINDOW:], set()
    if recent[-1].get("skipped"):
        messages.add(SKIPPED)
    if len(recent) < DIAGNOSE_WINDOW:
        return messages
    accuracy = fmean(row.get("accuracy", row["reward"]) for row in recent)
    if all(row["frac_truncated"] == 1 for row in recent):
        messages.add(TRUNCATED)
    if all(row["frac_reward_zero_std"] == 1 for row in recent):
        messages.add(SOLVED if accuracy > 0.99 else NO_SIGNAL)
    learning = [r for r in recent if r["frac_reward_zero_std"] < 1 and not r.get("skipped")]
    entropies = [row["entropy"] for row in learning if row["entropy"] is not None]
    if entropies and max(entropies) < 1e-3 and accuracy < 0.9:
        messages.add(COLLAPSED)
    return {" ".join(message.split()) for message in messages}
