"""Files: written whole or not at all, whatever is killed and whichever disk fills up, and read as data."""
import json
import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

UMASK = os.umask(0)  # it can be read only by setting it
os.umask(UMASK)


@contextmanager
def write_whole(path):
    """Yields a hidden path beside `path` to fill, as a file or as a folder of files; it is flushed and renamed at the end.
    Replaces a file of that name, never a folder that holds anything (OSError). After an error nothing is left."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Some writers choose the format by the suffix. A name may have 255 bytes, so of a long one only the end is kept.
    hidden = path.with_name(f".{os.urandom(4).hex()}.{path.name[-60:]}")
    try:
        yield hidden
        for file in hidden.iterdir() if hidden.is_dir() else [hidden]:
            file.chmod(0o666 & ~UMASK)  # some writers make files that are private to the user, as temporary ones are
            with open(file, "rb+") as f:
                os.fsync(f.fileno())
        os.replace(hidden, path)
    finally:
        if hidden.is_dir():
            shutil.rmtree(hidden)
        else:
            hidden.unlink(missing_ok=True)


def write_text(path, text):
    """A text file, whole or not at all."""
    with write_whole(path) as hidden:
        hidden.write_text(text, encoding="utf-8", errors="surrogateescape")  # of the command line: in its own bytes


def write_json(path, value):
    """A JSON file, whole or not at all."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_folder(folder, settings_name, settings, weights_name, tensors):
    """A folder of weights {name: tensor} with their settings (a dict) beside them as JSON, whole or not at all."""
    from safetensors.torch import save_file
    with write_whole(folder) as hidden:
        hidden.mkdir()
        (hidden / settings_name).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        save_file({k: v.contiguous() for k, v in tensors.items()}, hidden / weights_name, {"format": "pt"})


def read_json(path):
    """A JSON object from a file; ValueError naming the file if it is none."""
    try:
        content = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON, found something else ({first_line(error)})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def read_text(path, newline=None):
    """A text file in UTF-8; ValueError naming it if it is none. A byte order mark is dropped; newline: as open() has it."""
    try:
        with open(path, encoding="utf-8-sig", newline=newline) as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a text file in UTF-8 ({first_line(error)})") from None


def check_folder(path, setting="out"):
    """An error if files cannot go into this folder, there or not yet: ValueError for a file, OSError where it is read-only."""
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not existing.is_dir():
        raise ValueError(f"{setting} {path}: is a file, or inside one; it must be a folder, there or not")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"{setting} {path}: cannot be written")


def check_exists(path):
    """ValueError unless there is such a file or folder; None names none."""
    if path is not None and not path.exists():
        raise ValueError(f"{path}: no such file or folder")


def first_line(error):
    """The kind of an exception and its first sentence, short enough for one line."""
    message = str(error).split("WeightsUnpickler error: ")[-1].strip()  # torch puts its own advice before the cause
    sentence = re.split(r"\. |\n", message)[0][:160]
    return f"{type(error).__name__}: {sentence}" if sentence else type(error).__name__


def first_names(names, n=3):
    """The first few of some names, and how many more there are, for a message."""
    shown = [name[:100] if name.isprintable() else repr(name[:100]) for name in sorted(names)[:n]]
    return ", ".join(shown) + (f" and {len(names) - n} more" if len(names) > n else "")
