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
    The key of a new comparison: pairs as pages.runs.pair_up has them, in random order, each with who is left.

    names: (A's, B's). A is left in half of the pairs, so that a habit of voting left favours neither. Drawn
    from the system's own randomness: with a seed, whoever knows the default could work out the sides.
    """
    system = random.SystemRandom()
    lefts = ["a", "b"] * ((len(pairs) + 1) // 2)  # of an odd number of pairs the last one here is dropped
    system.shuffle(lefts)
    shuffled = system.sample(pairs, len(pairs))
    return {"comparison": secrets.token_hex(6), "a": names[0], "b": names[1],
            "pairs": [pair | {"left": left} for pair, left in zip(shuffled, lefts)]}


def read_key(path):
    """What draw_key wrote; ValueError for anything else."""
    key = read_json(path)
    missing = {"comparison", "a", "b", "pairs"} - key.keys()
    if missing:
        raise ValueError(f"{path}: not the key of a blind comparison (no {', '.join(sorted(missing))})")
    return key


def read_votes(path, key):
    """(rater, {(pair, question): "a", "tie" or "b"}) of a file that the page exported; ValueError if it is no
    such file."""
    content = read_json(path)
    if content.get("comparison") != key["comparison"]:
        raise ValueError(f"{path}: votes on another comparison than the key's "
                         f"({content.get('comparison')!s:.40})")
    votes = {}
    try:
        for vote in content["votes"]:
            number = vote["pair"]
            if number not in range(len(key["pairs"])):
                raise KeyError(f"pair {number!r:.40}")
            for question in QUESTIONS:
                side = vote.get(question)
                if side not in (None, *SIDES):
                    raise ValueError(f"{path}: {question} of pair {number} is {side!r:.40}; must be one of "
                                     f"{', '.join(SIDES)}")
                if side is not None:
                    votes[number, question] = unblind(key["pairs"][number], side)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not the votes of a comparison ({first_line(error)})") from None
    return str(content.get("rater") or path.stem)[:60], votes


def unblind(pair, side):
    """Whose clip is on this side; "tie" stays what it is."""
    other = "b" if pair["left"] == "a" else "a"
    return {"left": pair["left"], "tie": "tie", "right": other}[side]


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


def choices_by_pair(votes, question, count):
    """[the choices of all who voted on it] for each of `count` pairs, always in the same order of raters."""
    choices = []
    for i in range(count):
        choices.append([ballot[i, question] for ballot in votes.values() if (i, question) in ballot])
    return choices


def shares(choices):
    """
    {"prompts", "votes": how many there are, "shares": {choice: (share, low, high)}} of a choices_by_pair.

    Each prompt counts once, however many voted on it. Votes on one prompt depend on each other, so the
    interval is that of as many trials as there are prompts.
    """
    voted = [Counter(row) for row in choices if row]
    found = {}
    for choice in ("a", "tie", "b"):
        share = sum(counts[choice] / counts.total() for counts in voted) / max(len(voted), 1)
        found[choice] = (share, *wilson(share, len(voted)))
    return {"prompts": len(voted), "votes": sum(map(len, choices)), "shares": found}


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
    n = len(rows)
    m = len(rows[0])
    seen = 0.
    total = Counter()
    for row in rows:
        counts = Counter(row)
        total += counts
        seen += (sum(v * v for v in counts.values()) - m) / (m * (m - 1)) / n
    chance = sum((v / (n * m)) ** 2 for v in total.values())
    return None if chance == 1 else (seen - chance) / (1 - chance)


def kappa_of(rows):
    """The measure's name, kappa or None, and how many prompts. rows [n]: all raters' choices of a prompt."""
    if rows and len(rows[0]) > 2:
        return {"measure": "Fleiss' kappa", "kappa": fleiss_kappa(rows), "prompts": len(rows)}
    kappa = cohen_kappa([row[0] for row in rows], [row[1] for row in rows])
    return {"measure": "Cohen's kappa", "kappa": kappa, "prompts": len(rows)}


def reward_choices(key):
    """The reward as a rater: its choice of each pair, None where the key does not know the scores."""
    choices = []
    for pair in key["pairs"]:
        choice = None
        if pair["reward"]:
            a = pair["reward"]["a"]
            b = pair["reward"]["b"]
            choice = "tie" if a == b else "a" if a > b else "b"
        choices.append(choice)
    return choices


def majority(choices):
    """What most raters of a pair chose; a tie of choices is a tie."""
    counts = Counter(choices).most_common()
    return counts[0][0] if len(counts) == 1 or counts[0][1] > counts[1][1] else "tie"


def tally(key, votes):
    """
    What was voted, by question and prompt set, and what the reward would have; and how much they agree:
    {"rows": [{who, question, set, ...shares}], "agreement": [{question, between, ...kappa_of}], ...}.

    votes: {rater: {(pair, question): choice}}.
    """
    sets = {}
    for i, pair in enumerate(key["pairs"]):
        sets.setdefault(pair["set"], []).append(i)
    every = {"all": range(len(key["pairs"]))}
    sets = every | sets if len(sets) > 1 else every

    reward = reward_choices(key)
    agreement = []
    tables = []
    for question in QUESTIONS:
        choices = choices_by_pair(votes, question, len(key["pairs"]))
        tables.append(("people", question, choices))
        if len(votes) > 1:
            rows = [row for row in choices if len(row) == len(votes)]  # prompts that all voted on
            agreement.append({"question": question, "between": f"{len(votes)} raters"} | kappa_of(rows))
        rows = [(majority(row), choice) for row, choice in zip(choices, reward) if row and choice]
        if rows:
            agreement.append({"question": question, "between": "most raters and the reward"} | kappa_of(rows))
    if any(reward):
        tables.append(("the reward", "its score", [[choice] if choice else [] for choice in reward]))

    rows = []
    for who, question, choices in tables:
        for name, pairs in sets.items():
            found = shares([choices[i] for i in pairs])
            rows.append({"who": who, "question": question, "set": name} | found)
    return {"a": key["a"], "b": key["b"], "raters": list(votes), "rows": rows, "agreement": agreement}
