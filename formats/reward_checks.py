"""What can be known to be wrong with a reward before anything is downloaded, from its name and its weights' path alone."""
import ast
import re
from pathlib import Path

from formats.reward_model import spread_frames
from formats.weights import WHOLE_CLIPS, reward_kind
from support.files import first_line, read_text


def check_kind(kind, weights, num_frames):
    """
    ValueError for an unknown kind, a class or function that is not named, weights that are not there, or too few frames.

    weights: their path, or None.
    """
    name, argument = reward_kind(kind)
    if name == "yolos" and not argument:
        raise ValueError("reward yolos: must name what is to go, as in yolos:book")
    if name in WHOLE_CLIPS and not (weights and Path(weights).is_dir()):  # there, its config.json says how many
        spread_frames(num_frames, WHOLE_CLIPS[name])
    if weights and not re.fullmatch(r"random(:\d+)?", str(weights)) and not Path(weights).exists():
        raise ValueError(f"reward {name}: {weights}: no such file or folder")
    if name.endswith(".py"):
        check_own(name, argument)


def check_own(file, function):
    """ValueError if a file of the user's own is not there, is no Python, or nowhere mentions the function. It is not run."""
    what = f"reward {file}:{function}"
    if not Path(file).is_file():
        raise ValueError(f"{what}: no such file")
    try:
        tree = ast.parse(read_text(file))
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{what}: the file cannot be imported ({first_line(error)})") from None
    mentioned = set()
    for node in ast.walk(tree):
        for field in ("name", "asname", "id", "attr", "value"):  # of definitions, imports, variables and strings
            word = getattr(node, field, None)
            mentioned |= {word} if isinstance(word, str) else set()
    if not function or not {function, "*"} & mentioned:
        defined = [node.name for node in tree.body if hasattr(node, "name")]
        raise ValueError(f"{what}: must name a function of the file, as in {file}:NAME; it has "
                         f"{', '.join(defined[:8]) or 'none'}")
