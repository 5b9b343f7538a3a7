"""A blind comparison of two models (the paper's Table 2, Appendix D): people see two clips of one prompt and noise, and say which
looks better and which fits the text better. Which side is whose is drawn for each prompt, and in a key that voters do not get."""
import math
import random
import secrets
from statistics import multimode

import numpy as np

from support.files import first_line, read_json

QUESTIONS = {"quality": "Which video looks better?", "alignment": "Which video fits the text better?"}


def draw_key(names, pairs):
    """The key of a new comparison: pairs as pages.run_files.pair_up has them, in random order, each with who is left.
    names: (A's, B's). A is left in half of the pairs, so that a habit of voting left favours neither. No seed gives it away."""
    system = random.SystemRandom()
    lefts = ["a", "b"] * ((len(pairs) + 1) // 2)
    system.shuffle(lefts)
    in_order = system.sample(pairs, len(pairs))
    drawn = [pair | {"left": left} for pair, left in zip(in_order, lefts)]  # of an odd number of pairs one left stays over
    return {"comparison": secrets.token_hex(6), "a": names[0], "b": names[1], "pairs": drawn}


def read_key(path):
    """What draw_key wrote; ValueError for anything else."""
    key = read_json(path)
    missing = {"comparison", "a", "b", "pairs"} - key.keys()
    if missing:
        raise ValueError(f"{path}: not the key of a blind comparison (no {', '.join(sorted(missing))})")
    return key


def read_votes(path, key):
    """(rater, {(pair, question): "a", "tie" or "b"}) of a file that the page exported; ValueError for any other file."""
    content = read_json(path)
    if content.get("comparison") != key["comparison"]:
        raise ValueError(f"{path}: votes on another comparison than the key's ({content.get('comparison')!s:.40})")
    votes = {}
    try:
        for vote in content["votes"]:
            pair = dict(enumerate(key["pairs"]))[vote["pair"]]
            for question in QUESTIONS:
                side = vote.get(question)
                if side is not None:
                    votes[vote["pair"], question] = unblind(pair, side)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not the votes of a comparison ({first_line(error)}); "
                         "a side must be one of left, tie, right") from None
    return str(content.get("rater") or path.stem)[:60], votes


def unblind(pair, side):
    """Whose clip is on this side; "tie" stays what it is."""
    other = "b" if pair["left"] == "a" else "a"
    return {"left": pair["left"], "tie": "tie", "right": other}[side]


def wilson(share, n, z=1.96):
    """95% interval of a share that was seen in n trials; unlike share ± error it stays in 0..1, with a width at 0 and 1."""
    if not n:
        return 0., 1.
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0., middle - half), min(1., middle + half)


def shares(choices):
    """{"prompts", "votes": how many there are, "shares": {choice: (share, low, high)}}; choices [n]: of all voters on a prompt.
    Each prompt counts once, however many voted on it: votes on one depend on each other, so a prompt is a trial."""
    voted = [row for row in choices if row]
    intervals = {}
    for choice in ("a", "tie", "b"):
        share = sum(row.count(choice) / len(row) for row in voted) / max(len(voted), 1)
        intervals[choice] = (share, *wilson(share, len(voted)))
    return {"prompts": len(voted), "votes": sum(map(len, choices)), "shares": intervals}


def kappa(rows):
    """Agreement of raters beyond chance: of two Cohen's (1960), of m > 2 Fleiss' (1971); rows [n]: all raters' choices of a
    prompt, in the same order. None where chance alone would agree always, or without votes."""
    if not rows:
        return None
    chosen = np.array(rows)[:, :, None] == np.unique(rows)                    # (n, m, choices)
    m = chosen.shape[1]
    alike = (chosen.sum(axis=1) ** 2).sum(axis=1) - m                         # (n,), of m (m - 1)
    seen = alike.mean() / (m * (m - 1))
    rates = chosen.mean(axis=0)                                               # (m, choices)
    chance = rates.prod(axis=0).sum() if m == 2 else (rates.mean(axis=0) ** 2).sum()
    return None if chance == 1 else float((seen - chance) / (1 - chance))


def agreement(question, between, rows):
    """What the tally says of how much raters agree; rows as in kappa."""
    measure = "Fleiss' kappa" if rows and len(rows[0]) > 2 else "Cohen's kappa"
    return {"question": question, "between": between, "measure": measure, "kappa": kappa(rows), "prompts": len(rows)}


def reward_choices(key):
    """The reward as a rater: its choice of each pair, None where the key does not know the scores."""
    choices = []
    for pair in key["pairs"]:
        scores = pair["reward"]
        equal = scores and scores["a"] == scores["b"]
        choices.append(None if not scores else "tie" if equal else max(scores, key=scores.get))
    return choices


def majority(choices):
    """What most raters of a pair chose; a tie of choices is a tie."""
    most = multimode(choices)
    return most[0] if len(most) == 1 else "tie"


def tally(key, votes):
    """What was voted, by question and prompt set, and what the reward would have; and how much they agree.
    votes: {rater: {(pair, question): choice}} -> {"rows": [{who, question, set, ...shares}], "agreement": [agreement()], ...}."""
    sets = {"all": range(len(key["pairs"]))}
    if len({pair["set"] for pair in key["pairs"]}) > 1:
        for i, pair in enumerate(key["pairs"]):
            sets.setdefault(pair["set"], []).append(i)

    reward = reward_choices(key)
    agreements = []
    tables = []
    for question in QUESTIONS:
        choices = []
        for i in sets["all"]:
            choices.append([ballot[i, question] for ballot in votes.values() if (i, question) in ballot])
        tables.append(("people", question, choices))
        if len(votes) > 1:
            everybody = [row for row in choices if len(row) == len(votes)]  # prompts that all voted on
            agreements.append(agreement(question, f"{len(votes)} raters", everybody))
        both = [(majority(row), choice) for row, choice in zip(choices, reward) if row and choice]
        if both:
            agreements.append(agreement(question, "most raters and the reward", both))
    if any(reward):
        tables.append(("the reward", "its score", [[choice] if choice else [] for choice in reward]))

    rows = []
    for who, question, choices in tables:
        for name, pairs in sets.items():
            rows.append({"who": who, "question": question, "set": name} | shares([choices[i] for i in pairs]))
    return {"a": key["a"], "b": key["b"], "raters": list(votes), "rows": rows, "agreement": agreements}
