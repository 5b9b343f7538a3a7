"""
A blind comparison of two models, as in the paper's Table 2 and Appendix D: who made which clip, and what the
votes say.

People see two clips of the same prompt and noise, and say which has the better quality and which fits the
text better. Which side is whose is drawn for each prompt, and written into a key that the voters do not get.
"""
import math
import random
import secrets
from collections import Counter

from support.files import first_line, read_json

QUESTIONS = {"quality": "Which video looks better?", "alignment": "Which video fits the text better?"}
SIDES = ("left", "tie", "right")


def draw_key(names, pairs):
    """
    The key of a new comparison: pairs [{name, caption, set, reward: {"a", "b"} or None}] in random order,
    each with who is left.

    names: (A's, B's). A is left in half of the pairs, so that a habit of voting left favours neither. Drawn
    from the system's own randomness: with a seed, whoever knows the default could work out the sides.
    """
    system = random.SystemRandom()
    lefts = ["a", "b"] * ((len(pairs) + 1) // 2)
    lefts = lefts[:len(pairs)] if len(pairs) % 2 == 0 else lefts[:len(pairs) - 1] + [system.choice("ab")]
    system.shuffle(lefts)
    pairs = system.sample(pairs, len(pairs))
    return {"comparison": secrets.token_hex(6), "a": names[0], "b": names[1],
            "pairs": [pair | {"left": left} for pair, left in zip(pairs, lefts)]}


def read_key(path):
    """What draw_key wrote; ValueError for anything else."""
    key = read_json(path)
    try:
        for name in ("comparison", "a", "b"):
            str(key[name])
        for pair in key["pairs"]:
            if pair["left"] not in ("a", "b"):
                raise KeyError("left")
            if not (isinstance(pair["caption"], str) and isinstance(pair["set"], str)):
                raise TypeError("caption and set must be text")
            if pair["reward"] is not None:
                float(pair["reward"]["a"]), float(pair["reward"]["b"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not the key of a blind comparison ({first_line(error)})") from None
    return key


def read_votes(path, key):
    """(rater, {(pair, question): "a", "tie" or "b"}) of a file that the page exported; ValueError if it is no
    such file."""
    content = read_json(path)
    if content.get("comparison") != key["comparison"]:
        raise ValueError(f"{path}: votes on another comparison than the key's "
                         f"({content.get('comparison')!s:.40})")
    votes = {}
    for vote in content.get("votes") if isinstance(content.get("votes"), list) else [None]:
        pair = vote.get("pair") if isinstance(vote, dict) else None
        if type(pair) is not int or not 0 <= pair < len(key["pairs"]):
            raise ValueError(f"{path}: not the votes of a comparison: pair {pair!r:.40}")
        for question in QUESTIONS:
            side = vote.get(question)
            if side is not None and side not in SIDES:
                raise ValueError(f"{path}: {question} of pair {pair} is {side!r:.40}; must be one of "
                                 f"{', '.join(SIDES)}")
            if side is not None:
                votes[pair, question] = side if side == "tie" else unblind(key["pairs"][pair], side)
    return str(content.get("rater") or path.stem)[:60], votes


def unblind(pair, side):
    """Whose clip is on this side."""
    return pair["left"] if side == "left" else "b" if pair["left"] == "a" else "a"


# ----------------------------------------------------------------------------------------------
# What the votes say

def wilson(share, n, z=1.96):
    """95% interval of a share that was seen in n trials; unlike share ± error it stays in 0..1 and has a
    width at 0 and 1."""
    if not n:
        return 0., 1.
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0., middle - half), min(1., middle + half)


def shares(votes, pairs, question):
    """
    {choice: (share, low, high)} and how many prompts and votes there are, over the votes of all raters on
    these pairs.

    votes: {rater: {(pair, question): choice}}. Each prompt counts once, however many voted on it. Votes on
    one prompt depend on each other, so the interval is that of as many trials as there are prompts.
    """
    of_prompt = []
    for pair in pairs:
        choices = [v[pair, question] for v in votes.values() if (pair, question) in v]
        if choices:
            of_prompt.append(Counter(choices))
    n = len(of_prompt)
    found = {}
    for choice in ("a", "tie", "b"):
        share = sum(c[choice] / c.total() for c in of_prompt) / n if n else 0.
        found[choice] = (share, *wilson(share, n))
    return found, n, sum(c.total() for c in of_prompt)


def cohen_kappa(first, second):
    """Agreement of two raters beyond chance (Cohen 1960); None where chance alone would agree always, or
    without votes."""
    n = len(first)
    if not n:
        return None
    seen = sum(a == b for a, b in zip(first, second)) / n
    ones, twos = Counter(first), Counter(second)
    chance = sum(ones[c] * twos[c] for c in ones) / n**2
    return None if chance == 1 else (seen - chance) / (1 - chance)


def fleiss_kappa(rows):
    """Agreement of m raters beyond chance (Fleiss 1971): rows [n] of the m choices of each prompt."""
    if not rows:
        return None
    n, m = len(rows), len(rows[0])
    counts = [Counter(row) for row in rows]
    seen = sum((sum(v * v for v in c.values()) - m) / (m * (m - 1)) for c in counts) / n
    total = Counter(choice for row in rows for choice in row)
    chance = sum((v / (n * m)) ** 2 for v in total.values())
    return None if chance == 1 else (seen - chance) / (1 - chance)


def agreement(votes, question):
    """(name of the measure, kappa or None, prompts that all raters voted on); None for a single rater."""
    if len(votes) < 2:
        return None
    common = sorted(set.intersection(*({p for p, q in v if q == question} for v in votes.values())))
    rows = [[v[pair, question] for v in votes.values()] for pair in common]
    if len(votes) == 2:
        return "Cohen's kappa", cohen_kappa([r[0] for r in rows], [r[1] for r in rows]), len(common)
    return "Fleiss' kappa", fleiss_kappa(rows), len(common)


def reward_choice(key):
    """The reward as a rater: {(pair, question): choice} for both questions, where the key knows the
    scores."""
    choices = {}
    for i, pair in enumerate(key["pairs"]):
        if pair["reward"]:
            a, b = pair["reward"]["a"], pair["reward"]["b"]
            for question in QUESTIONS:
                choices[i, question] = "tie" if a == b else "a" if a > b else "b"
    return choices


def majority(votes, pair, question):
    """What most raters chose; a tie of choices is a tie."""
    counts = Counter(v[pair, question] for v in votes.values() if (pair, question) in v).most_common()
    if not counts:
        return None
    return counts[0][0] if len(counts) == 1 or counts[0][1] > counts[1][1] else "tie"


def tally(key, votes):
    """
    {"rows": [...], "agreement": [...], "reward": ...}: shares by question and prompt set, for people and for
    the reward.

    votes: {rater: {(pair, question): choice}}.
    """
    sets = {"all": range(len(key["pairs"]))}
    for name in dict.fromkeys(pair["set"] for pair in key["pairs"]):
        sets[name] = [i for i, pair in enumerate(key["pairs"]) if pair["set"] == name]
    if len(sets) == 2:
        del sets[list(sets)[1]]
    reward, rows, agreements = reward_choice(key), [], []
    for who, ballots in (("people", votes), ("the reward", {"reward": reward} if reward else {})):
        for question in QUESTIONS if who == "people" else list(QUESTIONS)[:1] if ballots else ():
            for name, pairs in sets.items():
                found, prompts, count = shares(ballots, pairs, question)
                asked = question if who == "people" else "its score"
                rows.append({"who": who, "question": asked, "set": name, "prompts": prompts, "votes": count,
                             "shares": found})
    for question in QUESTIONS:
        between = agreement(votes, question)
        if between:
            agreements.append({"question": question, "between": f"{len(votes)} raters", "measure": between[0],
                               "kappa": between[1], "prompts": between[2]})
        both = [(m, reward[i, question]) for i in sets["all"] if (i, question) in reward
                and (m := majority(votes, i, question))]
        if both:
            agreements.append({"question": question, "between": "most raters and the reward",
                               "measure": "Cohen's kappa", "kappa": cohen_kappa(*map(list, zip(*both))),
                               "prompts": len(both)})
    return {"a": key["a"], "b": key["b"], "raters": list(votes), "rows": rows, "agreement": agreements}
